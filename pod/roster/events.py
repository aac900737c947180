"""The signed events a roster is made of: their words, bytes and signatures. An `Event` only exists when its
signatures hold; whether its author was allowed to say it is decided by `apply.py`.

Who redeems an invite is proven by an `Application`: signed by the invite's key, the new member's key and the
new node's key. The node that admits it wraps it in `MemberJoined`, signed by its own member, whose clock
judges the expiry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Annotated

from pod.canonical import (
    Certificate,
    DecodeError,
    Id,
    Length,
    Name,
    Signature,
    decode,
    decode_record,
    encode,
    encode_record,
    pack,
    unpack,
)
from pod.identity import IdentityError, KeyPair, certificate, node_of_certificate, verify

VERSION = 1
MAX_EVENT_BYTES = 192 * 1024
MAX_LAMPORT = 2**48
NO_POD = bytes(32)
KEY_ID_BYTES = 16
MAX_NUM_KEPT = 4096

KeyId = Annotated[bytes, Length(KEY_ID_BYTES, KEY_ID_BYTES)]
Hashes = Annotated[tuple[Id, ...], Length(0, MAX_NUM_KEPT)]


class Role(IntEnum):
    """A smaller number outranks a larger one."""

    OWNER = 1
    ADMIN = 2
    MEMBER = 3
    GUEST = 4


@dataclass(frozen=True, slots=True)
class PodCreated:
    """The first event; its hash is the pod id and its author the owner."""

    name: Name
    member_name: Name


@dataclass(frozen=True, slots=True)
class InviteIssued:
    """`invite` is the public half of the invite's one-time key."""

    invite: Id
    role: Role
    max_num_uses: int
    expires_ms: int


@dataclass(frozen=True, slots=True)
class InviteRevoked:
    """`kept` are the hashes of the joins with this invite that stay valid; nobody else joins with it."""

    invite: Id
    kept: Hashes


@dataclass(frozen=True, slots=True)
class Application:
    """What a joiner proves: it holds the invite's key, its new member key and its node's key."""

    pod: Id
    member: Id
    member_name: Name
    node: Id
    node_name: Name
    certificate_der: Certificate
    invite: Id
    invite_signature: Signature
    member_signature: Signature
    node_signature: Signature


@dataclass(frozen=True, slots=True)
class MemberJoined:
    """Authored by the member whose node admitted the joiner; the event's time is that node's."""

    application: Annotated[bytes, Length(1, 4096)]


@dataclass(frozen=True, slots=True)
class NodeAdded:
    """A further machine of the author, which proves to hold the node's key."""

    node: Id
    name: Name
    certificate_der: Certificate
    node_signature: Signature


@dataclass(frozen=True, slots=True)
class NodeRemoved:
    node: Id


@dataclass(frozen=True, slots=True)
class RoleChanged:
    """`kept` are the hashes of that member's events that count as it said them.

    When the role is lowered, every other one dated before this event counts as the lower role's.
    """

    member: Id
    role: Role
    kept: Hashes


@dataclass(frozen=True, slots=True)
class MemberRemoved:
    """`kept` are the hashes of that member's events, and of the joins with its invites, that stay valid.

    Every other one counts for nothing. When a member removes itself, what it said before stays.
    """

    member: Id
    kept: Hashes


@dataclass(frozen=True, slots=True)
class KeyIssued:
    """An API key exists. The bearer proves itself by its delegation; this is for listing and revoking."""

    key_id: KeyId
    name: Name
    expires_ms: int


@dataclass(frozen=True, slots=True)
class LimitedKeyIssued:
    """An API key with limits exists; 0 and no models are none. For listing, as `KeyIssued` is."""

    key_id: KeyId
    name: Name
    expires_ms: int
    cap_microcredits: int
    models: Annotated[tuple[Annotated[str, Length(1, 256)], ...], Length(0, 8)]
    max_num_requests_per_minute: int
    max_num_tokens_per_minute: int


@dataclass(frozen=True, slots=True)
class KeyRevoked:
    member: Id
    key_id: KeyId


@dataclass(frozen=True, slots=True)
class PolicySet:
    """Opaque here: the rate card and rules of the ledger."""

    policy: Annotated[bytes, Length(0, 64 * 1024)]


@dataclass(frozen=True, slots=True)
class ModelDeployed:
    """`reference` says where weights come from, `manifest` (opaque here) what they are.

    num_stages 0: placement decides.
    """

    name: Annotated[str, Length(1, 256)]
    reference: Annotated[str, Length(1, 1024)]
    model: Id
    manifest: Annotated[bytes, Length(0, 160 * 1024)]
    num_stages: int
    dtype: Annotated[str, Length(1, 16)]


@dataclass(frozen=True, slots=True)
class ModelRemoved:
    name: Annotated[str, Length(1, 256)]


@dataclass(frozen=True, slots=True)
class AuthoritySet:
    """The authority under which the gateways' HTTPS certificates are (opaque DER). The newest counts."""

    certificate_der: Annotated[bytes, Length(1, 8192)]


Body = (
    PodCreated
    | InviteIssued
    | InviteRevoked
    | MemberJoined
    | NodeAdded
    | NodeRemoved
    | RoleChanged
    | MemberRemoved
    | KeyIssued
    | KeyRevoked
    | PolicySet
    | ModelDeployed
    | ModelRemoved
    | AuthoritySet
    | LimitedKeyIssued
)

# Numbers on the wire; they are never given to another body.
TYPES: dict[int, type[Body]] = {
    1: PodCreated,
    2: InviteIssued,
    3: InviteRevoked,
    4: MemberJoined,
    5: NodeAdded,
    6: NodeRemoved,
    7: RoleChanged,
    8: MemberRemoved,
    9: KeyIssued,
    10: KeyRevoked,
    11: PolicySet,
    12: ModelDeployed,
    13: ModelRemoved,
    14: AuthoritySet,
    15: LimitedKeyIssued,
}
_NUMBERS = {kind: number for number, kind in TYPES.items()}


class EventError(ValueError):
    """Bytes that are no roster event, or one whose signatures do not hold."""


@dataclass(frozen=True)
class Event:
    """One signed fact about one pod. Made by `sign_event` or `decode_event` only."""

    pod: bytes
    author: bytes
    lamport: int
    time_ms: int
    body: Body
    signature: bytes
    raw: bytes

    @cached_property
    def hash(self) -> bytes:
        return hashlib.sha256(self.raw).digest()

    @cached_property
    def application(self) -> Application:
        """What a `MemberJoined` carries, decoded and verified once. Raises EventError for others."""
        if not isinstance(self.body, MemberJoined):
            raise EventError("this event carries no application")
        return decode_application(self.body.application)

    @property
    def order(self) -> tuple[int, bytes]:
        """The order in which every replica applies events."""
        return (self.lamport, self.hash)


def sign_event(
    body: Body, pod: bytes, author: bytes, sign: Callable[[bytes], bytes], lamport: int, time_ms: int
) -> Event:
    unsigned = _unsigned(pod, author, lamport, time_ms, body)
    signature = sign(_signed_bytes(unsigned))
    raw = encode({**unsigned, 7: signature})
    if len(raw) > MAX_EVENT_BYTES:
        raise EventError(f"the event has {len(raw)} bytes, at most {MAX_EVENT_BYTES} fit")
    return decode_event(raw)


def decode_event(raw: bytes) -> Event:
    """Raises EventError unless these are the canonical bytes of an event whose signatures all hold."""
    try:
        event = _event_of(decode(raw, MAX_EVENT_BYTES), raw)
    except DecodeError as error:
        raise EventError(f"not a roster event: {error}") from None
    unsigned = _unsigned(event.pod, event.author, event.lamport, event.time_ms, event.body)
    if encode({**unsigned, 7: event.signature}) != raw:
        raise EventError("not the canonical form of a roster event")
    if not verify(event.author, _signed_bytes(unsigned), event.signature):
        raise EventError("the event's signature does not match")
    if isinstance(event.body, MemberJoined):
        if event.application.pod != event.pod:
            raise EventError("the application is for another pod")
    elif isinstance(event.body, NodeAdded):
        _check_node_proof(event.pod, event.author, event.body)
    return event


def _event_of(value: object, raw: bytes) -> Event:
    if not isinstance(value, dict) or list(value) != list(range(8)):
        raise DecodeError("wrong fields")
    version, pod, author, lamport, time_ms, number, body, signature = value.values()
    if version != VERSION:
        raise DecodeError(f"version {version!r}, this node reads version {VERSION}")
    for part, num_bytes in ((pod, 32), (author, 32), (signature, 64)):
        if not isinstance(part, bytes) or len(part) != num_bytes:
            raise DecodeError("wrong ids")
    for count in (lamport, time_ms):
        if type(count) is not int or not 0 <= count < MAX_LAMPORT:
            raise DecodeError("number out of range")
    if type(number) is not int or number not in TYPES:
        raise DecodeError(f"unknown type {number!r}")
    return Event(pod, author, lamport, time_ms, unpack(TYPES[number], body), signature, raw)


def _unsigned(pod: bytes, author: bytes, lamport: int, time_ms: int, body: Body) -> dict[int, object]:
    return {
        0: VERSION,
        1: pod,
        2: author,
        3: lamport,
        4: time_ms,
        5: _NUMBERS[type(body)],
        6: pack(body),
    }


def _signed_bytes(unsigned: dict[int, object]) -> bytes:
    return b"gpu-pod roster event\0" + encode(unsigned)


def application(
    pod: bytes, invite: KeyPair, member: KeyPair, member_name: str, node: KeyPair, node_name: str
) -> bytes:
    """The signed bytes a joiner sends to the node that admits it."""
    der = certificate(node)
    claim = _claim(pod, member.public, member_name, node.public, node_name, der, invite.public)
    signatures = (invite.sign(claim), member.sign(claim), node.sign(claim))
    return encode_record(
        Application(pod, member.public, member_name, node.public, node_name, der, invite.public, *signatures)
    )


def decode_application(raw: bytes) -> Application:
    """Raises EventError unless the three signatures and the certificate hold."""
    try:
        claimed = decode_record(Application, raw, 4096)
    except DecodeError as error:
        raise EventError(f"not an application to join: {error}") from None
    claim = _claim(
        claimed.pod,
        claimed.member,
        claimed.member_name,
        claimed.node,
        claimed.node_name,
        claimed.certificate_der,
        claimed.invite,
    )
    for public, signature, whose in (
        (claimed.invite, claimed.invite_signature, "invite's"),
        (claimed.member, claimed.member_signature, "member's"),
        (claimed.node, claimed.node_signature, "node's"),
    ):
        if not verify(public, claim, signature):
            raise EventError(f"the {whose} signature does not match")
    _check_certificate(claimed.certificate_der, claimed.node)
    return claimed


def _claim(*fields: object) -> bytes:
    return b"gpu-pod application\0" + encode(list(fields))


def node_added(pod: bytes, member: bytes, node: KeyPair, name: str) -> NodeAdded:
    return NodeAdded(node.public, name, certificate(node), node.sign(_node_claim(pod, member)))


def _node_claim(pod: bytes, member: bytes) -> bytes:
    return b"gpu-pod node of member\0" + pod + member


def _check_node_proof(pod: bytes, member: bytes, body: NodeAdded) -> None:
    if not verify(body.node, _node_claim(pod, member), body.node_signature):
        raise EventError("the node's signature does not match")
    _check_certificate(body.certificate_der, body.node)


def _check_certificate(der: bytes, node: bytes) -> None:
    try:
        holder = node_of_certificate(der)
    except IdentityError as error:
        raise EventError(str(error)) from None
    if holder != node:
        raise EventError("the certificate is of another node")
