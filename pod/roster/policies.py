"""Policies: which ones count, and which were ever published by somebody with the right to publish then.

What counts now may cease to: an admin is removed, and its events that the remover had not seen are cut. But
another part of the pod may have seen and used them, and what was written there refers to them for good. So
`published_policies` asks only what no later event can undo: whether the author is the owner, or whether the
owner ever made it an admin, by its role or by an admin's invite that it joined with. It never loses an
element when more events are known. The contents are opaque here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pod.roster.events import Event, InviteIssued, MemberJoined, PolicySet, Role, RoleChanged


@dataclass(frozen=True, slots=True)
class Policy:
    """`time_ms` is by its author's clock, for people."""

    author: bytes
    time_ms: int
    content: bytes


def policy_of(event: Event, body: PolicySet) -> Policy:
    return Policy(event.author, event.time_ms, body.policy)


def published_policies(owner: bytes, events: Sequence[Event]) -> tuple[Policy, ...]:
    """In order of the events; whether each counts now or not."""
    publishers = {owner}
    admin_invites = {
        event.body.invite
        for event in events
        if isinstance(event.body, InviteIssued) and event.author == owner and event.body.role is Role.ADMIN
    }
    for event in events:
        body = event.body
        if isinstance(body, RoleChanged) and event.author == owner and body.role is Role.ADMIN:
            publishers.add(body.member)
        elif isinstance(body, MemberJoined) and event.application.invite in admin_invites:
            publishers.add(event.application.member)
    return tuple(
        policy_of(event, event.body)
        for event in events
        if isinstance(event.body, PolicySet) and event.author in publishers
    )
