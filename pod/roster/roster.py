"""The roster: members, nodes, invites, keys, models and policy of a pod at one moment, frozen, with look-ups.
It is the result of `roster_of(events)`; it knows neither events' bytes nor who is reachable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from pod.roster.events import Role
from pod.roster.policies import Policy


class InviteState(Enum):
    OPEN = "open"
    USED = "used"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Member:
    id: bytes
    name: str
    role: Role
    joined_ms: int


@dataclass(frozen=True, slots=True)
class Node:
    id: bytes
    member: bytes
    name: str
    certificate_der: bytes


@dataclass(frozen=True, slots=True)
class InviteRecord:
    """`members` are those who joined with it, in order."""

    id: bytes
    issued_by: bytes
    role: Role
    max_num_uses: int
    expires_ms: int
    revoked: bool = False
    members: tuple[bytes, ...] = ()

    def state(self, now_ms: int) -> InviteState:
        if self.revoked:
            return InviteState.REVOKED
        if len(self.members) >= self.max_num_uses:
            return InviteState.USED
        return InviteState.EXPIRED if now_ms > self.expires_ms else InviteState.OPEN


@dataclass(frozen=True, slots=True)
class LostJoin:
    """Somebody who redeemed an invite that others had used up first in the order; not a member."""

    member: bytes
    name: str
    node: bytes
    invite: bytes


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """An API key as its member announced it; what counts at a gateway is what the key itself says."""

    id: bytes
    member: bytes
    name: str
    issued_ms: int
    expires_ms: int
    revoked: bool
    cap_microcredits: int = 0
    models: tuple[str, ...] = ()
    max_num_requests_per_minute: int = 0
    max_num_tokens_per_minute: int = 0


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    reference: str
    id: bytes
    manifest: bytes
    num_stages: int
    dtype: str


@dataclass(frozen=True)
class Roster:
    """`removed` holds member and node ids that never come back under the same key.

    `former_members` and `former_nodes` say who those were: what they signed stays in the pod's books.
    `keys` are by (member, key id): two members may name one id, and each has a key of its own then.
    `policies` are those that count, the newest last; `published_policies` also those that were cut since.
    `authority_der`: the certificate that those of the gateways are under.
    """

    pod: bytes
    name: str
    members: Mapping[bytes, Member]
    nodes: Mapping[bytes, Node]
    invites: Mapping[bytes, InviteRecord]
    keys: Mapping[tuple[bytes, bytes], KeyRecord]
    revoked_keys: frozenset[tuple[bytes, bytes]]
    models: Mapping[str, Model]
    policies: tuple[Policy, ...]
    published_policies: tuple[Policy, ...]
    removed: frozenset[bytes]
    lost_joins: tuple[LostJoin, ...]
    former_members: Mapping[bytes, Member]
    former_nodes: Mapping[bytes, Node]
    authority_der: bytes | None = None

    @property
    def owner(self) -> Member:
        return next(member for member in self.members.values() if member.role is Role.OWNER)

    @property
    def policy(self) -> bytes | None:
        """What was set last."""
        return self.policies[-1].content if self.policies else None

    def member_of_node(self, node: bytes) -> bytes | None:
        found = self.nodes.get(node)
        return found.member if found else None

    def nodes_of(self, member: bytes) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes.values() if node.member == member)

    def role_of(self, member: bytes) -> Role | None:
        found = self.members.get(member)
        return found.role if found else None

    def member_named(self, name: str) -> Member | None:
        return next((member for member in self.members.values() if member.name == name), None)

    def node_named(self, name: str) -> Node | None:
        return next((node for node in self.nodes.values() if node.name == name), None)

    def certificates(self) -> tuple[bytes, ...]:
        return tuple(node.certificate_der for node in self.nodes.values())

    def open_invites(self, now_ms: int) -> frozenset[bytes]:
        return frozenset(
            invite.id for invite in self.invites.values() if invite.state(now_ms) is InviteState.OPEN
        )
