"""The proof that a member lets another member's node charge it: its API key's delegation and, over one hold,
that key's own signature.

The bearer text holds the private key, so only a gateway that was shown it can sign. Permanent: expiry and
revocation are the gateway's to check when it admits a request, not the ledger's afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

from ledger.entry import MAX_AUTHORIZATION_BYTES, HoldOpened
from ledger.receipt import SIGNATURE_BYTES
from pod.api_key import ApiKeyError, Delegation, decode_delegation
from pod.canonical import DecodeError, decode, encode
from pod.identity import verify

Authorize = Callable[[HoldOpened], bytes]

_CONTEXT = b"gpu-pod hold authorization, v1\0"


def authorize(delegation: Delegation, sign: Callable[[bytes], bytes], node: bytes, hold: HoldOpened) -> bytes:
    """`sign` is that of the API key's own one-off key; `node` is the head that will open the hold."""
    return encode([delegation.encode(), sign(_signed_bytes(delegation.pod, node, hold))])


def fits(delegation: Delegation) -> bool:
    """Whether an authorization with this delegation is short enough for an entry."""
    return len(encode([delegation.encode(), bytes(SIGNATURE_BYTES)])) <= MAX_AUTHORIZATION_BYTES


def is_authorized(pod: bytes, node: bytes, hold: HoldOpened) -> bool:
    """Whether the payer's delegation of this key, and this key for this hold, are both signed.

    A hold above the key's cap is nobody's to open; what all holds together come to, gateways check.
    """
    try:
        delegation, signature = _decode(hold.authorization)
    except (ApiKeyError, DecodeError):
        return False
    return (
        (delegation.pod, delegation.member, delegation.key_id) == (pod, hold.payer, hold.key_id)
        and (not delegation.cap_microcredits or hold.amount_microcredits <= delegation.cap_microcredits)
        and len(signature) == SIGNATURE_BYTES
        and verify(delegation.key_public, _signed_bytes(pod, node, hold), signature)
    )


def _decode(raw: bytes) -> tuple[Delegation, bytes]:
    match decode(raw, MAX_AUTHORIZATION_BYTES):
        case [bytes() as delegation, bytes() as signature]:
            return decode_delegation(delegation), signature
        case _:
            raise DecodeError("not an authorization")


def _signed_bytes(pod: bytes, node: bytes, hold: HoldOpened) -> bytes:
    return _CONTEXT + encode(
        [pod, hold.session, node, hold.payer, hold.amount_microcredits, hold.expires_at_ms]
    )
