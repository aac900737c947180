"""A receipt: one stage's cumulative work for one session, signed by the head and co-signed by the stage.

It knows keys, counts and prices, not accounts: whose node a stage is and what a receipt does to balances is
decided in `books.py`. Signatures carry a context string, so that none passes for another kind of record's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ledger import canonical
from ledger.rate_card import RateCard, price

RECEIPT_VERSION = 1
POD_ID_BYTES = 32
NODE_ID_BYTES = 32
MEMBER_ID_BYTES = 32
SESSION_ID_BYTES = 16
KEY_ID_BYTES = 16
MODEL_ID_BYTES = 32
SIGNATURE_BYTES = 64
MAX_SIGNED_RECEIPT_BYTES = 640
_MAX_RECEIPT_BYTES = 448
_MAX_COUNT = 2**40
_MAX_NUM_LAYERS = 2**16
_MAX_NUM_PARAMETERS = 2**48

HEAD_CONTEXT = b"gpu-pod receipt, head, v1\x00"
STAGE_CONTEXT = b"gpu-pod receipt, stage, v1\x00"

Sign = Callable[[bytes], bytes]


class ReceiptError(ValueError):
    """A receipt is malformed, or a signature or amount on it is wrong."""


class Dispute(Exception):
    """A head's receipt does not agree with the stage's own count."""


class WrongTerms(Dispute):
    """It is not even for the session that was opened."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """The signed statement. Counts and amount are cumulative; of one stage only the highest sequence counts.

    `num_prompt_tokens` includes `num_cached_tokens`; `num_parameters` are those of layers
    `[start_layer, end_layer)` plus embedding or output head where they run.
    """

    pod: bytes
    session: bytes
    stage_index: int
    head: bytes
    payer: bytes
    key_id: bytes
    stage: bytes
    model: bytes
    start_layer: int
    end_layer: int
    num_parameters: int
    rate_card_version: int
    sequence: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    amount_microcredits: int
    version: int = RECEIPT_VERSION

    def encode(self) -> bytes:
        return canonical.encode(
            (
                self.version,
                self.pod,
                self.session,
                self.stage_index,
                self.head,
                self.payer,
                self.key_id,
                self.stage,
                self.model,
                self.start_layer,
                self.end_layer,
                self.num_parameters,
                self.rate_card_version,
                self.sequence,
                self.num_prompt_tokens,
                self.num_cached_tokens,
                self.num_output_tokens,
                self.amount_microcredits,
            )
        )

    @staticmethod
    def decode(raw: bytes, *, was_checked: bool = False) -> Receipt:
        """Raise ReceiptError unless `raw` is exactly the encoding of a receipt."""
        try:
            return _read_receipt(canonical.decode(raw, _MAX_RECEIPT_BYTES, was_checked=was_checked))
        except canonical.CanonicalError as error:
            raise ReceiptError(f"not a receipt: {error}") from error


def _read_receipt(reader: canonical.FieldReader) -> Receipt:
    reader.expect_num_fields(18)
    receipt = Receipt(
        version=reader.uint(0),
        pod=reader.raw(1, POD_ID_BYTES),
        session=reader.raw(2, SESSION_ID_BYTES),
        stage_index=reader.uint(3, _MAX_NUM_LAYERS),
        head=reader.raw(4, NODE_ID_BYTES),
        payer=reader.raw(5, MEMBER_ID_BYTES),
        key_id=reader.raw(6, KEY_ID_BYTES),
        stage=reader.raw(7, NODE_ID_BYTES),
        model=reader.raw(8, MODEL_ID_BYTES),
        start_layer=reader.uint(9, _MAX_NUM_LAYERS),
        end_layer=reader.uint(10, _MAX_NUM_LAYERS),
        num_parameters=reader.uint(11, _MAX_NUM_PARAMETERS),
        rate_card_version=reader.uint(12, 2**32 - 1),
        sequence=reader.uint(13, _MAX_COUNT),
        num_prompt_tokens=reader.uint(14, _MAX_COUNT),
        num_cached_tokens=reader.uint(15, _MAX_COUNT),
        num_output_tokens=reader.uint(16, _MAX_COUNT),
        amount_microcredits=reader.uint(17),
    )
    if receipt.version != RECEIPT_VERSION:
        raise canonical.CanonicalError(f"version {receipt.version} is unknown")
    if receipt.start_layer >= receipt.end_layer:
        raise canonical.CanonicalError("the layer range is empty")
    if receipt.num_cached_tokens > receipt.num_prompt_tokens:
        raise canonical.CanonicalError("more cached tokens than prompt tokens")
    return receipt


@dataclass(frozen=True, slots=True)
class SignedReceipt:
    """A receipt with the head's signature and, once the stage agreed, the stage's (empty before)."""

    receipt: Receipt
    head_signature: bytes
    stage_signature: bytes = b""

    @property
    def is_co_signed(self) -> bool:
        return bool(self.stage_signature)

    def encode(self) -> bytes:
        return canonical.encode((self.receipt.encode(), self.head_signature, self.stage_signature))

    @staticmethod
    def decode(raw: bytes, *, was_checked: bool = False) -> SignedReceipt:
        """Raise ReceiptError unless `raw` is the encoding of a signed receipt. Checks no signature."""
        try:
            reader = canonical.decode(raw, MAX_SIGNED_RECEIPT_BYTES, was_checked=was_checked)
            reader.expect_num_fields(3)
            receipt_raw = reader.raw_up_to(0, _MAX_RECEIPT_BYTES)
            signed = SignedReceipt(
                receipt=Receipt.decode(receipt_raw, was_checked=was_checked),
                head_signature=reader.raw(1, SIGNATURE_BYTES),
                stage_signature=reader.raw_up_to(2, SIGNATURE_BYTES),
            )
        except canonical.CanonicalError as error:
            raise ReceiptError(f"not a signed receipt: {error}") from error
        if len(signed.stage_signature) not in (0, SIGNATURE_BYTES):
            raise ReceiptError("not a signed receipt: the stage's signature has a wrong size")
        return signed


def sign_as_head(receipt: Receipt, sign: Sign) -> SignedReceipt:
    return SignedReceipt(receipt, sign(HEAD_CONTEXT + receipt.encode()))


def co_sign(signed: SignedReceipt, sign: Sign) -> SignedReceipt:
    """The stage's agreement; call `verify_head` and `check_against_count` before."""
    return replace(signed, stage_signature=sign(STAGE_CONTEXT + signed.receipt.encode()))


def verify_head(signed: SignedReceipt) -> None:
    """Raise ReceiptError unless the receipt's head signed it."""
    message = HEAD_CONTEXT + signed.receipt.encode()
    if not is_signed_by(signed.receipt.head, signed.head_signature, message):
        raise ReceiptError("the head's signature on the receipt does not match")


def verify_stage(signed: SignedReceipt) -> None:
    """Raise ReceiptError unless the receipt's stage co-signed it."""
    message = STAGE_CONTEXT + signed.receipt.encode()
    if not is_signed_by(signed.receipt.stage, signed.stage_signature, message):
        raise ReceiptError("the stage's signature on the receipt does not match")


# A head checks a stage's signature when it comes and again when it settles, and an entry that waits for
# another is looked at more than once; the answer for the same bytes is the same.
@lru_cache(maxsize=4096)
def is_signed_by(public_key: bytes, signature: bytes, message: bytes) -> bool:
    try:
        _public_key(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


@lru_cache(maxsize=1024)
def _public_key(raw: bytes) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(raw)


def expected_amount(receipt: Receipt, card: RateCard) -> int:
    """What the receipt's counts cost on the rate card it names."""
    return price(
        card,
        receipt.num_parameters,
        receipt.num_prompt_tokens,
        receipt.num_cached_tokens,
        receipt.num_output_tokens,
    )


@dataclass(frozen=True, slots=True)
class WorkCount:
    """What the stage itself knows of a session: the terms it was opened with and its own cumulative count.

    `last` is the receipt it co-signed last, if any.
    """

    pod: bytes
    session: bytes
    stage_index: int
    head: bytes
    payer: bytes
    key_id: bytes
    stage: bytes
    model: bytes
    start_layer: int
    end_layer: int
    num_parameters: int
    rate_card: RateCard
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    last: Receipt | None = None


_TERMS = (
    "pod",
    "session",
    "stage_index",
    "head",
    "payer",
    "key_id",
    "stage",
    "model",
    "start_layer",
    "end_layer",
    "num_parameters",
)
_COUNTS = ("num_prompt_tokens", "num_cached_tokens", "num_output_tokens")


def check_against_count(receipt: Receipt, own: WorkCount) -> None:
    """Raise Dispute unless the stage may co-sign: same terms, no token above its count, a risen sequence.

    With the first output token the whole prompt is due: it was computed before that token was made.
    """
    for name in _TERMS:
        if getattr(receipt, name) != getattr(own, name):
            raise WrongTerms(f"{name} is not what the session was opened with")
    if receipt.rate_card_version != own.rate_card.version:
        raise WrongTerms(f"rate card {receipt.rate_card_version}, the session has {own.rate_card.version}")
    for name in _COUNTS:
        if getattr(receipt, name) > getattr(own, name):
            raise Dispute(f"{name} is {getattr(receipt, name)}, the stage counted {getattr(own, name)}")
    if receipt.num_output_tokens > 0 and receipt.num_prompt_tokens != own.num_prompt_tokens:
        raise Dispute(f"num_prompt_tokens is {receipt.num_prompt_tokens}, not {own.num_prompt_tokens}")
    if receipt.amount_microcredits != expected_amount(receipt, own.rate_card):
        raise Dispute("the amount is not the price of the counts")
    if own.last is not None:
        _check_rise(receipt, own.last)


def _check_rise(receipt: Receipt, last: Receipt) -> None:
    if receipt.sequence <= last.sequence:
        raise Dispute(f"sequence {receipt.sequence} does not rise above {last.sequence}")
    for name in _COUNTS:
        if getattr(receipt, name) < getattr(last, name):
            raise Dispute(f"{name} fell from {getattr(last, name)} to {getattr(receipt, name)}")
