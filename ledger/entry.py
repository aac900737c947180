"""Entries: the signed, chained records of a journal, and the bodies they can carry.

An entry is the canonical CBOR map `{version, pod, author, index, prev_hash, type, body, signature}`, integers
and bytes only; its hash is the sha256 of all its bytes. What is allowed is in `rules.py`, what an entry does
to balances in `books.py`; here is only the form. A change of the form is a new version, never an edit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import sha256

from ledger import canonical
from ledger.canonical import FieldReader, Value
from ledger.receipt import (
    KEY_ID_BYTES,
    MAX_SIGNED_RECEIPT_BYTES,
    MEMBER_ID_BYTES,
    MODEL_ID_BYTES,
    NODE_ID_BYTES,
    POD_ID_BYTES,
    SESSION_ID_BYTES,
    SIGNATURE_BYTES,
    ReceiptError,
    Sign,
    SignedReceipt,
    is_signed_by,
)

ENTRY_VERSION = 1
HASH_BYTES = 32
FIRST_PREV_HASH = bytes(HASH_BYTES)
MAX_ENTRY_BYTES = 64 * 1024
MAX_NUM_RECEIPTS = 128
MAX_AMOUNT_MICROCREDITS = 2**53
MAX_REFERENCE_BYTES = 64
MAX_AUTHORIZATION_BYTES = 1024
# The last moment that a date with four digits of year can name.
MAX_TIME_MS = 253_402_300_799_999
_MAX_COUNT = 2**40
_MAX_VERSION = 2**32 - 1

ENTRY_CONTEXT = b"gpu-pod entry, v1\x00"
# CBOR: the head of a map of seven; a key of one byte and a head of two before the signature.
_UNSIGNED_MAP = b"\xa7"
_SIGNATURE_FIELD_BYTES = 3 + SIGNATURE_BYTES

TREASURY = b"treasury"
ISSUANCE = b"issuance"


class EntryError(ValueError):
    """The bytes are not an entry of a version we know, in canonical form."""


class VoidReason(IntEnum):
    """Why a hold was given back."""

    FAILED = 0
    CANCELLED = 1
    NO_ROUTE = 2


class DisputeReason(IntEnum):
    """Why a stage did not sign, or stopped serving."""

    TERMS = 0
    COUNTS = 1
    UNSIGNED_LIMIT = 2


@dataclass(frozen=True, slots=True)
class AccountOpened:
    """The treasury pays `member` the starter grant of that rate card; however often it is said, once."""

    member: bytes
    rate_card_version: int
    reference: bytes = b""


@dataclass(frozen=True, slots=True)
class Issued:
    """New credit, from issuance to the treasury."""

    amount_microcredits: int
    reference: bytes = b""


@dataclass(frozen=True, slots=True)
class Transferred:
    """A move between members' accounts and the treasury."""

    from_account: bytes
    to_account: bytes
    amount_microcredits: int
    reference: bytes = b""


@dataclass(frozen=True, slots=True)
class HoldOpened:
    """The head reserves the worst case of a session on the payer's account until `expires_at_ms`.

    `authorization` proves that the head may charge this payer; empty when it is the head's own member.
    """

    session: bytes
    payer: bytes
    key_id: bytes
    model: bytes
    amount_microcredits: int
    expires_at_ms: int
    rate_card_version: int
    authorization: bytes = b""


@dataclass(frozen=True, slots=True)
class HoldSettled:
    """The head ends the session: what the client was given, and what each stage is owed."""

    session: bytes
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    receipts: tuple[SignedReceipt, ...]


@dataclass(frozen=True, slots=True)
class HoldVoided:
    """The head ends the session without a settlement."""

    session: bytes
    reason: VoidReason


@dataclass(frozen=True, slots=True)
class ReceiptClaimed:
    """A stage presents a receipt its head never settled."""

    receipt: SignedReceipt


@dataclass(frozen=True, slots=True)
class Disputed:
    """A stage says that a head's receipt (if it got one) is not what the stage counted. Moves nothing."""

    session: bytes
    reason: DisputeReason
    receipt: SignedReceipt | None = None


Body = (
    AccountOpened | Issued | Transferred | HoldOpened | HoldSettled | HoldVoided | ReceiptClaimed | Disputed
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One record. `raw` is its full encoding and `hash` the sha256 of that."""

    pod: bytes
    author: bytes
    index: int
    prev_hash: bytes
    time_ms: int
    body: Body
    signature: bytes
    raw: bytes = field(repr=False)
    hash: bytes = field(repr=False)
    version: int = ENTRY_VERSION

    def is_signed_by_author(self) -> bool:
        # A map of seven fields in place of eight, and the last, the signature, taken off: what was signed.
        unsigned = _UNSIGNED_MAP + self.raw[1:-_SIGNATURE_FIELD_BYTES]
        return is_signed_by(self.author, self.signature, ENTRY_CONTEXT + unsigned)


def sign_entry(
    pod: bytes, author: bytes, index: int, prev_hash: bytes, time_ms: int, body: Body, sign: Sign
) -> Entry:
    """Make the author's next entry. Raises EntryError when a field cannot be encoded as an entry."""
    unsigned = _unsigned_fields(pod, author, index, prev_hash, time_ms, body)
    signature = sign(ENTRY_CONTEXT + canonical.encode(unsigned))
    # Decoding applies every limit to our own entries before they are written anywhere.
    return decode_entry(canonical.encode((*unsigned, signature)))


def decode_entry(raw: bytes, *, was_checked: bool = False) -> Entry:
    """Raise EntryError unless `raw` is exactly the encoding of an entry. Checks no signature.

    `was_checked`: the hash of `raw` is that of an entry decoded before, so its form is not compared again.
    """
    try:
        reader = canonical.decode(raw, MAX_ENTRY_BYTES, was_checked=was_checked)
        reader.expect_num_fields(8)
        if (version := reader.uint(0)) != ENTRY_VERSION:
            raise EntryError(f"entry version {version} is unknown")
        body_reader = reader.reader(6)
        return Entry(
            pod=reader.raw(1, POD_ID_BYTES),
            author=reader.raw(2, NODE_ID_BYTES),
            index=reader.uint(3),
            prev_hash=reader.raw(4, HASH_BYTES),
            time_ms=body_reader.uint(0, MAX_TIME_MS),
            body=_decode_body(reader.uint(5), body_reader),
            signature=reader.raw(7, SIGNATURE_BYTES),
            raw=raw,
            hash=sha256(raw).digest(),
        )
    except (canonical.CanonicalError, ReceiptError) as error:
        raise EntryError(f"not an entry: {error}") from error


def _unsigned_fields(
    pod: bytes, author: bytes, index: int, prev_hash: bytes, time_ms: int, body: Body
) -> tuple[Value, ...]:
    kind, values = _body_fields(body)
    return (ENTRY_VERSION, pod, author, index, prev_hash, kind, canonical.fields(time_ms, *values))


def _body_fields(body: Body) -> tuple[int, tuple[Value, ...]]:
    """The type number and the fields after the time. The numbers are the format: never reuse one."""
    match body:
        case AccountOpened():
            return 1, (body.member, body.rate_card_version, body.reference)
        case Issued():
            return 2, (body.amount_microcredits, body.reference)
        case Transferred():
            return 3, (body.from_account, body.to_account, body.amount_microcredits, body.reference)
        case HoldOpened():
            return 4, (
                body.session,
                body.payer,
                body.key_id,
                body.model,
                body.amount_microcredits,
                body.expires_at_ms,
                body.rate_card_version,
                body.authorization,
            )
        case HoldSettled():
            return 5, (
                body.session,
                body.num_prompt_tokens,
                body.num_cached_tokens,
                body.num_output_tokens,
                [signed.encode() for signed in body.receipts],
            )
        case HoldVoided():
            return 6, (body.session, int(body.reason))
        case ReceiptClaimed():
            return 7, (body.receipt.encode(),)
        case Disputed():
            return 8, (
                body.session,
                int(body.reason),
                body.receipt.encode() if body.receipt is not None else b"",
            )


def _decode_body(kind: int, reader: FieldReader) -> Body:
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise EntryError(f"entry type {kind} is unknown")
    num_fields, read = decoder
    reader.expect_num_fields(num_fields)
    return read(reader)


def _account_opened(reader: FieldReader) -> Body:
    return AccountOpened(reader.raw(1, MEMBER_ID_BYTES), reader.uint(2, _MAX_VERSION), _reference(reader, 3))


def _issued(reader: FieldReader) -> Body:
    return Issued(_amount(reader, 1), _reference(reader, 2))


def _transferred(reader: FieldReader) -> Body:
    return Transferred(_account(reader, 1), _account(reader, 2), _amount(reader, 3), _reference(reader, 4))


def _hold_opened(reader: FieldReader) -> Body:
    return HoldOpened(
        session=reader.raw(1, SESSION_ID_BYTES),
        payer=reader.raw(2, MEMBER_ID_BYTES),
        key_id=reader.raw(3, KEY_ID_BYTES),
        model=reader.raw(4, MODEL_ID_BYTES),
        amount_microcredits=_amount(reader, 5),
        expires_at_ms=reader.uint(6, MAX_TIME_MS),
        rate_card_version=reader.uint(7, _MAX_VERSION),
        authorization=reader.raw_up_to(8, MAX_AUTHORIZATION_BYTES),
    )


def _hold_settled(reader: FieldReader) -> Body:
    return HoldSettled(
        session=reader.raw(1, SESSION_ID_BYTES),
        num_prompt_tokens=reader.uint(2, _MAX_COUNT),
        num_cached_tokens=reader.uint(3, _MAX_COUNT),
        num_output_tokens=reader.uint(4, _MAX_COUNT),
        receipts=tuple(
            SignedReceipt.decode(raw, was_checked=reader.was_checked)
            for raw in reader.raws(5, MAX_NUM_RECEIPTS, MAX_SIGNED_RECEIPT_BYTES)
        ),
    )


def _hold_voided(reader: FieldReader) -> Body:
    return HoldVoided(reader.raw(1, SESSION_ID_BYTES), VoidReason(reader.uint(2, max(VoidReason))))


def _receipt_claimed(reader: FieldReader) -> Body:
    raw = reader.raw_up_to(1, MAX_SIGNED_RECEIPT_BYTES)
    return ReceiptClaimed(SignedReceipt.decode(raw, was_checked=reader.was_checked))


def _disputed(reader: FieldReader) -> Body:
    raw = reader.raw_up_to(3, MAX_SIGNED_RECEIPT_BYTES)
    return Disputed(
        session=reader.raw(1, SESSION_ID_BYTES),
        reason=DisputeReason(reader.uint(2, max(DisputeReason))),
        receipt=SignedReceipt.decode(raw, was_checked=reader.was_checked) if raw else None,
    )


def _account(reader: FieldReader, key: int) -> bytes:
    account = reader.raw_up_to(key, MEMBER_ID_BYTES)
    if len(account) != MEMBER_ID_BYTES and account != TREASURY:
        raise canonical.CanonicalError(f"field {key} is no account")
    return account


def _amount(reader: FieldReader, key: int) -> int:
    return reader.uint(key, MAX_AMOUNT_MICROCREDITS)


def _reference(reader: FieldReader, key: int) -> bytes:
    return reader.raw_up_to(key, MAX_REFERENCE_BYTES)


# Number of fields (the time included) and reader of each type.
_DECODERS: dict[int, tuple[int, Callable[[FieldReader], Body]]] = {
    1: (4, _account_opened),
    2: (3, _issued),
    3: (5, _transferred),
    4: (9, _hold_opened),
    5: (6, _hold_settled),
    6: (3, _hold_voided),
    7: (2, _receipt_claimed),
    8: (4, _disputed),
}
