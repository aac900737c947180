"""Cuts: what removals, revoked invites and lowered roles leave valid of what was said. A cut names the events
that stay (`kept`); whatever else of its kind arrives, however it is dated, counts for nothing, or with the
lower role. The owner's cuts are taken first. Knows no members' state: who may cut, `apply.py` decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pod.roster.events import (
    MAX_NUM_KEPT,
    Event,
    InviteIssued,
    InviteRevoked,
    MemberJoined,
    MemberRemoved,
    NodeAdded,
    Role,
    RoleChanged,
)


class Cuts:
    """Grows while a roster is computed; a cut that was taken is never taken back."""

    def __init__(self, owner: bytes, events: Sequence[Event]) -> None:
        """`events` in order."""
        self._owner = owner
        self._removed: dict[bytes, frozenset[bytes]] = {}
        self._left: dict[bytes, tuple[Event, frozenset[bytes]]] = {}
        self._invites: dict[bytes, frozenset[bytes]] = {}
        self._taken: set[bytes] = set()
        self._lowered: dict[bytes, list[tuple[Event, RoleChanged]]] = {}
        self._last_role: dict[bytes, Role] = {}
        self._joins: dict[bytes, set[bytes]] = {}
        for event in events:
            if isinstance(event.body, MemberJoined):
                self._joins.setdefault(event.application.invite, set()).add(event.hash)
            if event.author == owner:
                self._take_owners(event)

    def _take_owners(self, event: Event) -> None:
        body = event.body
        if isinstance(body, MemberRemoved | InviteRevoked):
            self.take(event, frozenset())
        elif isinstance(body, RoleChanged) and body.role is not Role.OWNER:
            before = self._last_role.get(body.member)
            if before is None or before < body.role:
                self._lowered.setdefault(body.member, []).append((event, body))
            self._last_role[body.member] = body.role

    def take(self, event: Event, needed: frozenset[bytes]) -> None:
        """`needed`: events that are none of the author's business to undo."""
        body = event.body
        assert isinstance(body, MemberRemoved | InviteRevoked)
        self._taken.add(event.hash)
        kept = frozenset(body.kept) | needed
        if isinstance(body, InviteRevoked):
            self._invites[body.invite] = self._invites.get(body.invite, kept) & kept
        elif body.member == self._owner:
            return
        elif event.author == body.member:
            self._left.setdefault(body.member, (event, needed))
        else:
            self._removed[body.member] = self._removed.get(body.member, kept) & kept

    def is_new(self, event: Event) -> bool:
        """Whether this cut was not taken yet and could change something."""
        body = event.body
        if event.hash in self._taken:
            return False
        if isinstance(body, InviteRevoked):
            before = self._invites.get(body.invite)
        elif isinstance(body, MemberRemoved):
            if event.author == body.member:
                return not self.is_removed(body.member)
            before = self._removed.get(body.member)
        else:
            return False
        return before is None or not before <= frozenset(body.kept)

    def undoes_nothing(self, event: Event) -> bool:
        """Whether an invite is revoked that nobody joined with but those named."""
        body = event.body
        return isinstance(body, InviteRevoked) and self._joins.get(body.invite, set()) <= set(body.kept)

    def is_removed(self, member: bytes) -> bool:
        return member in self._removed or member in self._left

    def removed(self) -> frozenset[bytes]:
        return frozenset(self._removed) | frozenset(self._left)

    def is_revoked(self, invite: bytes, issued_by: bytes) -> bool:
        return invite in self._invites or self.is_removed(issued_by)

    def keeps(self, member: bytes, event: Event) -> bool:
        """Whether `event`, by this member or a join with its invite, still counts."""
        kept = self._removed.get(member)
        if kept is not None and event.hash not in kept:
            return False
        left = self._left.get(member)
        return left is None or event.order <= left[0].order or event.hash in left[1]

    def lets_in(self, invite: bytes, issued_by: bytes, join: Event) -> bool:
        kept = self._invites.get(invite)
        return (kept is None or join.hash in kept) and self.keeps(issued_by, join)

    def role_at_most(self, role: Role, event: Event) -> Role:
        """The role with which an event counts whose author had `role` then, by the order."""
        for lowered, body in self._lowered.get(event.author, ()):
            if event.order < lowered.order and event.hash not in body.kept:
                role = max(role, body.role)
        return role

    def highest_role(self, member: bytes, role: Role) -> Role:
        """Of `role` and what the owner said last: nobody gains by dating a cut before a promotion."""
        return min(role, self._last_role.get(member, role))


def kept_of_member(member: bytes, events: Iterable[Event]) -> tuple[bytes, ...]:
    """What a removal or a lower role leaves valid: the member's events and the joins with its invites.

    Where there are too many, those that others' membership hangs on come first, then the newest.
    """
    events = tuple(events)
    invites = {e.body.invite for e in events if isinstance(e.body, InviteIssued) and e.author == member}
    invite_of = {e.hash: e.application.invite for e in events if isinstance(e.body, MemberJoined)}
    used = frozenset(invite_of.values())
    own = [event for event in events if event.author == member or invite_of.get(event.hash) in invites]

    def rank(event: Event) -> tuple[bool, int]:
        first = isinstance(event.body, MemberJoined | NodeAdded) or (
            isinstance(event.body, InviteIssued) and event.body.invite in used
        )
        return (not first, -event.lamport)

    return tuple(event.hash for event in sorted(own, key=rank)[:MAX_NUM_KEPT])


def kept_of_invite(invite: bytes, events: Iterable[Event]) -> tuple[bytes, ...]:
    """The joins that revoking an invite leaves valid."""
    joins = (e for e in events if isinstance(e.body, MemberJoined) and e.application.invite == invite)
    return tuple(event.hash for event in joins)[:MAX_NUM_KEPT]
