"""API keys: `sk-pod-…` is the private half of a one-off key and a delegation signed by its member.
Any node verifies it offline from the roster. The delegation alone may be shown to other nodes; the bearer
text never leaves the gateway that was given it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Annotated

from pod import base58, identity
from pod.canonical import DecodeError, Id, Length, Name, Signature, decode, encode, pack, unpack
from pod.identity import KeyPair
from pod.roster.events import KEY_ID_BYTES, KeyIssued, LimitedKeyIssued
from pod.roster.roster import Roster

PREFIX = "sk-pod-"
MAX_DELEGATION_BYTES = 4096
MAX_NUM_MODELS = 8
# A key may be this far ahead of a node's clock: clocks differ.
MAX_CLOCK_SKEW_MS = 60 * 60 * 1000
# Version 1 lacks the limits per minute: its fields by their place in version 2.
_VERSION_1_PLACES = (*range(9), 11)
_NO_SIGNATURE = bytes(64)


class ApiKeyReason(Enum):
    MALFORMED = "malformed"
    NOT_THIS_POD = "not_this_pod"
    UNKNOWN_MEMBER = "unknown_member"
    EXPIRED = "expired"
    FUTURE = "future"
    REVOKED = "revoked"


_MESSAGES = {
    ApiKeyReason.MALFORMED: "the API key is malformed",
    ApiKeyReason.NOT_THIS_POD: "the API key is for another pod",
    ApiKeyReason.UNKNOWN_MEMBER: "the API key's member is not in this pod",
    ApiKeyReason.EXPIRED: "the API key has expired",
    ApiKeyReason.FUTURE: "the API key is dated in the future: this node's clock or its maker's is wrong",
    ApiKeyReason.REVOKED: "the API key was revoked",
}


class ApiKeyError(ValueError):
    def __init__(self, reason: ApiKeyReason) -> None:
        super().__init__(_MESSAGES[reason])
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Delegation:
    """What the key may do for the member. expires_ms 0: never; a cap or limit of 0: none; no models: all."""

    version: int
    pod: Id
    member: Id
    key_public: Id
    name: Name
    created_ms: int
    expires_ms: int
    cap_microcredits: int
    models: Annotated[tuple[Annotated[str, Length(1, 256)], ...], Length(0, MAX_NUM_MODELS)]
    max_num_requests_per_minute: int
    max_num_tokens_per_minute: int
    signature: Signature

    @property
    def key_id(self) -> bytes:
        return hashlib.sha256(self.key_public).digest()[:KEY_ID_BYTES]

    def encode(self) -> bytes:
        fields = pack(self)
        if self.version == 1:
            assert not self.max_num_requests_per_minute + self.max_num_tokens_per_minute
            fields = {number: fields[place] for number, place in enumerate(_VERSION_1_PLACES)}
        return encode(fields)


def decode_delegation(raw: bytes) -> Delegation:
    """Raises ApiKeyError unless these are the canonical bytes of a delegation its member signed."""
    try:
        delegation = _delegation_of(decode(raw, MAX_DELEGATION_BYTES))
    except DecodeError:
        raise ApiKeyError(ApiKeyReason.MALFORMED) from None
    if delegation.encode() != raw:
        raise ApiKeyError(ApiKeyReason.MALFORMED)
    if not identity.verify(delegation.member, _signed_bytes(delegation), delegation.signature):
        raise ApiKeyError(ApiKeyReason.MALFORMED)
    return delegation


def _delegation_of(fields: object) -> Delegation:
    match fields:
        case {0: 1, **rest} if len(rest) == len(_VERSION_1_PLACES) - 1:
            known = dict(zip(_VERSION_1_PLACES, (1, *rest.values()), strict=True))
            return unpack(Delegation, dict(sorted({9: 0, 10: 0, **known}.items())))
        case {0: 2}:
            return unpack(Delegation, fields)
        case _:
            raise DecodeError("not a delegation of a known version")


def delegate(
    pod: bytes,
    member: bytes,
    sign: Callable[[bytes], bytes],
    name: str,
    created_ms: int,
    expires_ms: int = 0,
    cap_microcredits: int = 0,
    models: tuple[str, ...] = (),
    max_num_requests_per_minute: int = 0,
    max_num_tokens_per_minute: int = 0,
) -> tuple[KeyPair, Delegation]:
    """A fresh key and what the member, whose `sign` this is, lets it do."""
    key = KeyPair.create()
    unsigned = Delegation(
        # Nodes that know no limits per minute can go on reading keys that have none.
        version=2 if max_num_requests_per_minute or max_num_tokens_per_minute else 1,
        pod=pod,
        member=member,
        key_public=key.public,
        name=name,
        created_ms=created_ms,
        expires_ms=expires_ms,
        cap_microcredits=cap_microcredits,
        models=models,
        max_num_requests_per_minute=max_num_requests_per_minute,
        max_num_tokens_per_minute=max_num_tokens_per_minute,
        signature=_NO_SIGNATURE,
    )
    return key, replace(unsigned, signature=sign(_signed_bytes(unsigned)))


def announcement(delegation: Delegation) -> KeyIssued | LimitedKeyIssued:
    """What the roster says of a key, for listing and revoking: nothing that opens anything."""
    plain = KeyIssued(delegation.key_id, delegation.name, delegation.expires_ms)
    limits = (
        delegation.cap_microcredits,
        delegation.models,
        delegation.max_num_requests_per_minute,
        delegation.max_num_tokens_per_minute,
    )
    return LimitedKeyIssued(plain.key_id, plain.name, plain.expires_ms, *limits) if any(limits) else plain


def bearer_text(key: KeyPair, delegation: Delegation) -> str:
    return PREFIX + base58.encode(key.seed + delegation.encode())


def parse_bearer(text: str) -> tuple[KeyPair, Delegation]:
    """Raises ApiKeyError when it is no key of any pod; whether it is valid here is `verify`'s."""
    if not text.startswith(PREFIX):
        raise ApiKeyError(ApiKeyReason.MALFORMED)
    try:
        raw = base58.decode(text[len(PREFIX) :], max_num_characters=2 * MAX_DELEGATION_BYTES)
    except ValueError:
        raise ApiKeyError(ApiKeyReason.MALFORMED) from None
    if len(raw) <= 32:
        raise ApiKeyError(ApiKeyReason.MALFORMED)
    key, delegation = KeyPair.of_seed(raw[:32]), decode_delegation(raw[32:])
    if key.public != delegation.key_public:
        raise ApiKeyError(ApiKeyReason.MALFORMED)
    return key, delegation


def verify(delegation: Delegation, roster: Roster, now_ms: int) -> None:
    """Raises ApiKeyError with the reason unless the key may be used in this pod now."""
    if delegation.pod != roster.pod:
        raise ApiKeyError(ApiKeyReason.NOT_THIS_POD)
    if delegation.member not in roster.members:
        raise ApiKeyError(ApiKeyReason.UNKNOWN_MEMBER)
    if (delegation.member, delegation.key_id) in roster.revoked_keys:
        raise ApiKeyError(ApiKeyReason.REVOKED)
    if delegation.expires_ms and now_ms > delegation.expires_ms:
        raise ApiKeyError(ApiKeyReason.EXPIRED)
    if delegation.created_ms > now_ms + MAX_CLOCK_SKEW_MS:
        raise ApiKeyError(ApiKeyReason.FUTURE)


def _signed_bytes(delegation: Delegation) -> bytes:
    return b"gpu-pod api key\0" + replace(delegation, signature=_NO_SIGNATURE).encode()
