"""`roster_of(events)`: the one place that decides what an event changes and whether its author may say so.
Pure and independent of arrival order: events are applied by (lamport, hash). It knows no keys and no disk;
signatures were checked when the events were read.

Rules: the owner may do everything except leave; an admin may invite, remove and revoke whom it outranks and
set policy and models; members admit joiners; guests only use. A removal names the removed member's events
that stay valid, so that what it says later, or with an earlier date, counts for nothing. The owner's removals
are taken first, then the admins' in order; a removal that was taken is never taken back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pod.roster.events import (
    NO_POD,
    Event,
    InviteIssued,
    InviteRevoked,
    KeyIssued,
    KeyRevoked,
    MemberJoined,
    MemberRemoved,
    ModelDeployed,
    ModelRemoved,
    NodeAdded,
    NodeRemoved,
    PodCreated,
    PolicySet,
    Role,
    RoleChanged,
)
from pod.roster.roster import InviteRecord, KeyRecord, LostJoin, Member, Model, Node, Roster


class RosterError(ValueError):
    """No roster can be made of these events."""


def roster_of(pod: bytes, events: Iterable[Event]) -> Roster:
    """The roster of `pod`. Raises RosterError when the event that created the pod is missing."""
    ordered = sorted((event for event in events if _is_of(event, pod)), key=lambda event: event.order)
    created = next((event for event in ordered if event.hash == pod), None)
    if created is None or not isinstance(created.body, PodCreated):
        raise RosterError("the event that created the pod is missing")
    rest = [event for event in ordered if event is not created]
    removals: dict[bytes, frozenset[bytes]] = {}
    for event in rest:
        if event.author == created.author and isinstance(event.body, MemberRemoved):
            _take(removals, event, created.author)
    while True:
        draft = _Draft(pod, created, removals)
        removal = _first_new_removal(draft, rest)
        if removal is None:
            return draft.finish()
        _take(removals, removal, created.author)


def _is_of(event: Event, pod: bytes) -> bool:
    return event.hash == pod if isinstance(event.body, PodCreated) else event.pod == pod != NO_POD


def _take(removals: dict[bytes, frozenset[bytes]], event: Event, owner: bytes) -> None:
    assert isinstance(event.body, MemberRemoved)
    if event.body.member == owner:
        return
    kept = frozenset(event.body.kept)
    if event.author == event.body.member:
        kept |= {event.hash}
    removals[event.body.member] = removals.get(event.body.member, kept) & kept


def _first_new_removal(draft: _Draft, events: Sequence[Event]) -> Event | None:
    for event in events:
        if not draft.counts(event):
            continue
        if isinstance(event.body, MemberRemoved) and event.body.member not in draft.removals:
            if draft.may_remove(event.author, event.body.member):
                return event
            continue
        draft.apply(event)
    return None


@dataclass
class _Draft:
    """The roster while events are applied. Removed members stay in it until `finish`."""

    pod: bytes
    created: Event
    removals: Mapping[bytes, frozenset[bytes]]
    members: dict[bytes, Member] = field(default_factory=dict)
    nodes: dict[bytes, Node] = field(default_factory=dict)
    invites: dict[bytes, InviteRecord] = field(default_factory=dict)
    keys: dict[bytes, KeyRecord] = field(default_factory=dict)
    revoked_keys: set[tuple[bytes, bytes]] = field(default_factory=set)
    models: dict[str, Model] = field(default_factory=dict)
    policy: bytes | None = None
    removed_nodes: dict[bytes, Node] = field(default_factory=dict)
    lost_joins: list[LostJoin] = field(default_factory=list)

    def __post_init__(self) -> None:
        body = self.created.body
        assert isinstance(body, PodCreated)
        owner = self.created.author
        self.members[owner] = Member(owner, body.member_name, Role.OWNER, self.created.time_ms)

    def counts(self, event: Event) -> bool:
        """Whether the author is known and, if it was removed, the remover kept this event."""
        kept = self.removals.get(event.author)
        return event.author in self.members and (kept is None or event.hash in kept)

    def apply(self, event: Event) -> None:
        author = self.members[event.author]
        match event.body:
            case InviteIssued():
                self._invite(event, author, event.body)
            case InviteRevoked():
                self._revoke_invite(author, event.body.invite)
            case MemberJoined():
                self._join(event, author)
            case NodeAdded():
                self._add_node(author, event.body)
            case NodeRemoved():
                self._remove_node(author, event.body.node)
            case RoleChanged():
                self._change_role(author, event.body)
            case MemberRemoved():
                self._close_invites_of(event.body.member)
            case KeyIssued():
                self._issue_key(event, author, event.body)
            case KeyRevoked():
                self._revoke_key(author, event.body)
            case PolicySet():
                if author.role <= Role.ADMIN:
                    self.policy = event.body.policy
            case ModelDeployed():
                self._deploy(author, event.body)
            case ModelRemoved():
                if author.role <= Role.ADMIN:
                    self.models.pop(event.body.name, None)
            case PodCreated():
                pass

    def may_remove(self, author: bytes, member: bytes) -> bool:
        target = self.members.get(member)
        if target is None or target.role is Role.OWNER:
            return False
        return author == member or self._outranks(self.members[author], member)

    def finish(self) -> Roster:
        members = {id: member for id, member in self.members.items() if id not in self.removals}
        nodes = {id: node for id, node in self.nodes.items() if node.member in members}
        body = self.created.body
        assert isinstance(body, PodCreated)
        gone_nodes = {id: node for id, node in self.nodes.items() if node.member not in members}
        former_nodes = self.removed_nodes | gone_nodes
        return Roster(
            pod=self.pod,
            name=body.name,
            members=members,
            nodes=nodes,
            invites=self.invites,
            keys={id: key for id, key in self.keys.items() if key.member in members},
            revoked_keys=frozenset(self.revoked_keys),
            models=self.models,
            policy=self.policy,
            removed=frozenset(self.removals) | former_nodes.keys(),
            lost_joins=tuple(self.lost_joins),
            former_members={id: member for id, member in self.members.items() if id in self.removals},
            former_nodes=former_nodes,
        )

    def _outranks(self, author: Member, member: bytes) -> bool:
        target = self.members.get(member)
        return target is not None and author.role <= Role.ADMIN and author.role < target.role

    def _invite(self, event: Event, author: Member, body: InviteIssued) -> None:
        if author.role <= Role.ADMIN and author.role < body.role and body.invite not in self.invites:
            self.invites[body.invite] = InviteRecord(
                body.invite, event.author, body.role, body.max_num_uses, body.expires_ms
            )

    def _revoke_invite(self, author: Member, invite: bytes) -> None:
        record = self.invites.get(invite)
        if record is not None and author.role <= Role.ADMIN:
            self.invites[invite] = replace(record, revoked=True)

    def _close_invites_of(self, member: bytes) -> None:
        if member in self.removals:
            for invite in [one for one in self.invites.values() if one.issued_by == member]:
                self.invites[invite.id] = replace(invite, revoked=True)

    def _join(self, event: Event, author: Member) -> None:
        joiner = event.application
        invite = self.invites.get(joiner.invite)
        if invite is None or author.role > Role.MEMBER or invite.revoked or event.time_ms > invite.expires_ms:
            return
        if joiner.member in self.members or not self._node_is_free(joiner.node):
            return
        if len(invite.members) >= invite.max_num_uses:
            self.lost_joins.append(LostJoin(joiner.member, joiner.member_name, joiner.node, joiner.invite))
            return
        self.invites[invite.id] = replace(invite, members=(*invite.members, joiner.member))
        taken = {member.name for id, member in self.members.items() if id not in self.removals}
        name = _free_name(joiner.member_name, joiner.member, taken)
        self.members[joiner.member] = Member(joiner.member, name, invite.role, event.time_ms)
        self._put_node(joiner.node, joiner.member, joiner.node_name, joiner.certificate_der)

    def _add_node(self, author: Member, body: NodeAdded) -> None:
        if self._node_is_free(body.node):
            self._put_node(body.node, author.id, body.name, body.certificate_der)

    def _node_is_free(self, node: bytes) -> bool:
        return node not in self.nodes and node not in self.removed_nodes

    def _put_node(self, node: bytes, member: bytes, name: str, certificate_der: bytes) -> None:
        taken = {one.name for one in self.nodes.values() if one.member not in self.removals}
        self.nodes[node] = Node(node, member, _free_name(name, node, taken), certificate_der)

    def _remove_node(self, author: Member, node: bytes) -> None:
        found = self.nodes.get(node)
        if found is not None and (found.member == author.id or self._outranks(author, found.member)):
            self.removed_nodes[node] = self.nodes.pop(node)

    def _change_role(self, author: Member, body: RoleChanged) -> None:
        member = self.members.get(body.member)
        if member is None or Role.OWNER in (member.role, body.role):
            return
        if author.role is Role.OWNER:
            self.members[body.member] = replace(member, role=body.role)

    def _issue_key(self, event: Event, author: Member, body: KeyIssued) -> None:
        if body.key_id not in self.keys:
            revoked = (author.id, body.key_id) in self.revoked_keys
            self.keys[body.key_id] = KeyRecord(
                body.key_id, author.id, body.name, event.time_ms, body.expires_ms, revoked
            )

    def _revoke_key(self, author: Member, body: KeyRevoked) -> None:
        if author.id != body.member and not self._outranks(author, body.member):
            return
        self.revoked_keys.add((body.member, body.key_id))
        key = self.keys.get(body.key_id)
        if key is not None and key.member == body.member:
            self.keys[body.key_id] = replace(key, revoked=True)

    def _deploy(self, author: Member, body: ModelDeployed) -> None:
        if author.role <= Role.ADMIN:
            self.models[body.name] = Model(
                body.name, body.reference, body.model, body.manifest, body.num_stages, body.dtype
            )


def _free_name(wanted: str, id: bytes, taken: set[str]) -> str:
    """Two who took the same name in different partitions are told apart, the same way everywhere."""
    return wanted if wanted not in taken else f"{wanted[:55]}-{id.hex()[:8]}"
