"""An invite as text: one token to copy that carries everything a joiner needs, among it the private half of
the invite's one-time key. Whoever holds the text can join; the roster knows only the public half.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

from pod import base58
from pod.canonical import DecodeError, Id, Length, Name, Signature, decode_record, encode_record
from pod.identity import KeyPair, verify
from pod.roster.events import Role

PREFIX = "pod-invite-"
VERSION = 1
MAX_INVITE_BYTES = 8192
_CHECKSUM_BYTES = 4
_NO_SIGNATURE = bytes(64)


class InviteError(ValueError):
    """Why an invite cannot be used; the message is one line for people."""


@dataclass(frozen=True, slots=True)
class Invite:
    """`seed` is the private half of the invite's key, `issued_by` the member who signed it."""

    version: int
    pod: Id
    pod_name: Name
    addresses: Annotated[tuple[Annotated[str, Length(1, 256)], ...], Length(1, 16)]
    role: Role
    expires_ms: int
    max_num_uses: int
    seed: Id
    issued_by: Id
    signature: Signature

    @property
    def key(self) -> KeyPair:
        return KeyPair.of_seed(self.seed)

    def __repr__(self) -> str:
        return f"Invite({self.pod_name}, {self.role.name}, {self.key})"

    def text(self) -> str:
        raw = encode_record(self)
        return PREFIX + base58.encode(raw + _checksum(raw))


def signed_invite(unsigned: Invite, sign: Callable[[bytes], bytes]) -> Invite:
    return replace(unsigned, signature=sign(_signed_bytes(unsigned)))


def parse(text: str, now_ms: int) -> Invite:
    """Raises InviteError that says whether the text is damaged, was tampered with or has expired."""
    text = "".join(text.split())
    if not text.startswith(PREFIX):
        raise InviteError(f"not an invite: it should start with {PREFIX}")
    try:
        raw = base58.decode(text[len(PREFIX) :], max_num_characters=2 * MAX_INVITE_BYTES)
    except ValueError as error:
        raise InviteError(f"the invite is damaged: {error}; copy it again") from None
    raw, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    if checksum != _checksum(raw):
        raise InviteError("the invite is damaged: a part is missing or was changed; copy it again")
    try:
        invite = decode_record(Invite, raw, MAX_INVITE_BYTES)
    except DecodeError as error:
        raise InviteError(f"the invite was tampered with or is of another version: {error}") from None
    if invite.version != VERSION:
        raise InviteError(f"the invite is of version {invite.version}, this program reads {VERSION}")
    if not verify(invite.issued_by, _signed_bytes(invite), invite.signature):
        raise InviteError("the invite was tampered with: its signature does not match")
    if now_ms > invite.expires_ms:
        raise InviteError("the invite has expired; ask for a new one")
    return invite


def unsigned_invite(
    pod: bytes,
    pod_name: str,
    addresses: tuple[str, ...],
    role: Role,
    expires_ms: int,
    max_num_uses: int,
    issued_by: bytes,
) -> Invite:
    """A fresh invite with a key of its own, to be given to `signed_invite`."""
    seed = KeyPair.create().seed
    return Invite(
        VERSION, pod, pod_name, addresses, role, expires_ms, max_num_uses, seed, issued_by, _NO_SIGNATURE
    )


def _signed_bytes(invite: Invite) -> bytes:
    return b"gpu-pod invite\0" + encode_record(replace(invite, signature=_NO_SIGNATURE))


def _checksum(raw: bytes) -> bytes:
    return hashlib.sha256(b"gpu-pod invite text\0" + raw).digest()[:_CHECKSUM_BYTES]
