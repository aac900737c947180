"""`roster_of(events)`: the one place that decides what an event changes and whether its author may say so.
Pure and independent of arrival order: events are applied by (lamport, hash). It knows no keys and no disk;
signatures were checked when the events were read.

Rules: the owner may do everything except leave; an admin may invite, remove and revoke whom it outranks and
set policy and models; members admit joiners; guests only use. Removals and revocations are cuts: the owner's
are taken first, then the others' in order; none undoes the membership of whom its author does not outrank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from pod.roster.cuts import Cuts
from pod.roster.events import (
    NO_POD,
    AuthoritySet,
    Event,
    InviteIssued,
    InviteRevoked,
    KeyIssued,
    KeyRevoked,
    LimitedKeyIssued,
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
from pod.roster.policies import Policy, policy_of, published_policies
from pod.roster.roster import InviteRecord, KeyRecord, LostJoin, Member, Model, Node, Roster

MAX_NUM_NODES = 16
MAX_NUM_ADMIN_NODES = 64


class RosterError(ValueError):
    """No roster can be made of these events."""


def roster_of(pod: bytes, events: Iterable[Event]) -> Roster:
    """The roster of `pod`. Raises RosterError when the event that created the pod is missing."""
    different = {event.hash: event for event in events if _is_of(event, pod)}
    ordered = sorted(different.values(), key=lambda event: event.order)
    created = next((event for event in ordered if event.hash == pod), None)
    if created is None or not isinstance(created.body, PodCreated):
        raise RosterError("the event that created the pod is missing")
    rest = [event for event in ordered if event is not created]
    cuts = Cuts(created.author, rest)
    while True:
        draft = _Draft(pod, created, cuts)
        cut = draft.apply_all(rest)
        if cut is None:
            return draft.finish(published_policies(created.author, rest))
        cuts.take(cut, draft.needed())


def _is_of(event: Event, pod: bytes) -> bool:
    return event.hash == pod if isinstance(event.body, PodCreated) else event.pod == pod != NO_POD


@dataclass
class _Draft:
    """The roster while events are applied. Removed members stay in it until `finish`."""

    pod: bytes
    created: Event
    cuts: Cuts
    members: dict[bytes, Member] = field(default_factory=dict)
    nodes: dict[bytes, Node] = field(default_factory=dict)
    invites: dict[bytes, InviteRecord] = field(default_factory=dict)
    keys: dict[tuple[bytes, bytes], KeyRecord] = field(default_factory=dict)
    revoked_keys: set[tuple[bytes, bytes]] = field(default_factory=set)
    models: dict[str, Model] = field(default_factory=dict)
    policies: list[Policy] = field(default_factory=list)
    authority_der: bytes | None = None
    removed_nodes: dict[bytes, Node] = field(default_factory=dict)
    lost_joins: list[LostJoin] = field(default_factory=list)
    lost_nodes: dict[bytes, Node] = field(default_factory=dict)
    joins: dict[bytes, Event] = field(default_factory=dict)
    invitations: dict[bytes, Event] = field(default_factory=dict)

    def __post_init__(self) -> None:
        body = self.created.body
        assert isinstance(body, PodCreated)
        owner = self.created.author
        self.members[owner] = Member(owner, body.member_name, Role.OWNER, self.created.time_ms)

    def apply_all(self, events: Sequence[Event]) -> Event | None:
        """The first cut that is still to be taken, which asks for another draft."""
        cut = None
        for event in events:
            if event.author not in self.members or not self.cuts.keeps(event.author, event):
                continue
            if not isinstance(event.body, MemberRemoved | InviteRevoked):
                self._apply(event)
            elif cut is None and self.cuts.is_new(event) and self._may_cut(event, event.body):
                if self.cuts.undoes_nothing(event):
                    self.cuts.take(event, frozenset())
                else:
                    cut = event
        return cut

    def needed(self) -> frozenset[bytes]:
        """The events without which somebody whom no admin outranks would not be a member."""
        found: set[bytes] = set()
        seen: set[bytes] = set()
        waiting = [one.id for one in self.members.values() if self._highest_role(one) <= Role.ADMIN]
        waiting = [member for member in waiting if not self.cuts.is_removed(member)]
        while waiting:
            member = waiting.pop()
            join = self.joins.get(member)
            if join is None or member in seen:
                continue
            seen.add(member)
            invitation = self.invitations[join.application.invite]
            found |= {join.hash, invitation.hash}
            waiting += [join.author, invitation.author]
        return frozenset(found)

    def _apply(self, event: Event) -> None:
        author = self._author_of(event)
        match event.body:
            case InviteIssued():
                self._invite(event, author, event.body)
            case MemberJoined():
                self._join(event, author)
            case NodeAdded():
                self._add_node(author, event.body)
            case NodeRemoved():
                self._remove_node(author, event.body.node)
            case RoleChanged():
                self._change_role(author, event.body)
            case KeyIssued() | LimitedKeyIssued():
                self._issue_key(event, author, event.body)
            case KeyRevoked():
                self._revoke_key(author, event.body)
            case PolicySet():
                if author.role <= Role.ADMIN:
                    self.policies.append(policy_of(event, event.body))
            case ModelDeployed():
                self._deploy(author, event.body)
            case ModelRemoved():
                if author.role <= Role.ADMIN:
                    self.models.pop(event.body.name, None)
            case AuthoritySet():
                if author.role is Role.OWNER:
                    self.authority_der = event.body.certificate_der
            case PodCreated() | MemberRemoved() | InviteRevoked():
                pass

    def _author_of(self, event: Event) -> Member:
        author = self.members[event.author]
        role = self.cuts.role_at_most(author.role, event)
        return author if role is author.role else replace(author, role=role)

    def _may_cut(self, event: Event, body: MemberRemoved | InviteRevoked) -> bool:
        author = self._author_of(event)
        if isinstance(body, MemberRemoved):
            return author.id == body.member or self._outranks(author, body.member)
        invite = self.invites.get(body.invite)
        if invite is None or author.role > Role.ADMIN:
            return False
        return author.role < invite.role or author.id == invite.issued_by

    def finish(self, published: tuple[Policy, ...]) -> Roster:
        removed = self.cuts.removed()
        members = {id: member for id, member in self.members.items() if id not in removed}
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
            invites={id: self._closed(invite) for id, invite in self.invites.items()},
            keys={place: key for place, key in self.keys.items() if key.member in members},
            revoked_keys=frozenset(self.revoked_keys),
            models=self.models,
            policies=tuple(self.policies),
            published_policies=published,
            authority_der=self.authority_der,
            removed=removed | former_nodes.keys(),
            lost_joins=tuple(self.lost_joins),
            former_members={id: member for id, member in self.members.items() if id in removed},
            former_nodes={id: one for id, one in self.lost_nodes.items() if id not in nodes} | former_nodes,
        )

    def _closed(self, invite: InviteRecord) -> InviteRecord:
        return replace(invite, revoked=self.cuts.is_revoked(invite.id, invite.issued_by))

    def _highest_role(self, member: Member) -> Role:
        return self.cuts.highest_role(member.id, member.role)

    def _outranks(self, author: Member, member: bytes) -> bool:
        target = self.members.get(member)
        return target is not None and author.role <= Role.ADMIN and author.role < self._highest_role(target)

    def _invite(self, event: Event, author: Member, body: InviteIssued) -> None:
        if author.role <= Role.ADMIN and author.role < body.role and body.invite not in self.invites:
            self.invites[body.invite] = InviteRecord(
                body.invite, event.author, body.role, body.max_num_uses, body.expires_ms
            )
            self.invitations[body.invite] = event

    def _join(self, event: Event, author: Member) -> None:
        joiner = event.application
        invite = self.invites.get(joiner.invite)
        if invite is None or author.role > Role.MEMBER or event.time_ms > invite.expires_ms:
            return
        if joiner.member in self.members or not self._node_is_free(joiner.node):
            return
        lost = Node(joiner.node, joiner.member, joiner.node_name, joiner.certificate_der)
        if not self.cuts.lets_in(invite.id, invite.issued_by, event):
            self.lost_nodes.setdefault(joiner.node, lost)
            return
        if len(invite.members) >= invite.max_num_uses:
            self.lost_nodes.setdefault(joiner.node, lost)
            self.lost_joins.append(LostJoin(joiner.member, joiner.member_name, joiner.node, joiner.invite))
            return
        self.invites[invite.id] = replace(invite, members=(*invite.members, joiner.member))
        self.joins[joiner.member] = event
        taken = {one.name for id, one in self.members.items() if not self.cuts.is_removed(id)}
        name = _free_name(joiner.member_name, joiner.member, taken)
        self.members[joiner.member] = Member(joiner.member, name, invite.role, event.time_ms)
        self._put_node(joiner.node, joiner.member, joiner.node_name, joiner.certificate_der)

    def _add_node(self, author: Member, body: NodeAdded) -> None:
        limit = MAX_NUM_NODES if author.role > Role.ADMIN else MAX_NUM_ADMIN_NODES
        num_nodes = sum(node.member == author.id for node in self.nodes.values())
        if num_nodes < limit and self._node_is_free(body.node):
            self._put_node(body.node, author.id, body.name, body.certificate_der)

    def _node_is_free(self, node: bytes) -> bool:
        return node not in self.nodes and node not in self.removed_nodes

    def _put_node(self, node: bytes, member: bytes, name: str, certificate_der: bytes) -> None:
        taken = {one.name for one in self.nodes.values() if not self.cuts.is_removed(one.member)}
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

    def _issue_key(self, event: Event, author: Member, body: KeyIssued | LimitedKeyIssued) -> None:
        # An id says nothing about whose it is: anybody may name another member's, with any number.
        place = (author.id, body.key_id)
        if place in self.keys:
            return
        revoked = place in self.revoked_keys
        key = KeyRecord(body.key_id, author.id, body.name, event.time_ms, body.expires_ms, revoked)
        if isinstance(body, LimitedKeyIssued):
            key = replace(
                key,
                cap_microcredits=body.cap_microcredits,
                models=body.models,
                max_num_requests_per_minute=body.max_num_requests_per_minute,
                max_num_tokens_per_minute=body.max_num_tokens_per_minute,
            )
        self.keys[place] = key

    def _revoke_key(self, author: Member, body: KeyRevoked) -> None:
        if author.id != body.member and not self._outranks(author, body.member):
            return
        place = (body.member, body.key_id)
        self.revoked_keys.add(place)
        key = self.keys.get(place)
        if key is not None:
            self.keys[place] = replace(key, revoked=True)

    def _deploy(self, author: Member, body: ModelDeployed) -> None:
        if author.role <= Role.ADMIN:
            self.models[body.name] = Model(
                body.name, body.reference, body.model, body.manifest, body.num_stages, body.dtype
            )


def _free_name(wanted: str, id: bytes, taken: set[str]) -> str:
    """Two who took the same name in different partitions are told apart, the same way everywhere."""
    return wanted if wanted not in taken else f"{wanted[:55]}-{id.hex()[:8]}"
