"""Receipts: encoding, both signatures, and what a stage compares before it co-signs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger import canonical
from ledger.rate_card import DEFAULT_RATE_CARD
from ledger.receipt import (
    Dispute,
    Receipt,
    ReceiptError,
    SignedReceipt,
    WorkCount,
    check_against_count,
    verify_head,
    verify_stage,
)
from tests.ledger.world import World, session_id

WORLD = World()
RECEIPT = WORLD.receipt(session_id(1), num_cached_tokens=3)
SIGNED = WORLD.co_signed(RECEIPT)


def own_count(receipt: Receipt = RECEIPT, last: Receipt | None = None) -> WorkCount:
    return WorkCount(
        **{name: getattr(receipt, name) for name in WorkCount.__slots__ if name not in ("rate_card", "last")},
        rate_card=DEFAULT_RATE_CARD,
        last=last,
    )


def test_round_trip() -> None:
    assert SignedReceipt.decode(SIGNED.encode()) == SIGNED
    head_only = WORLD.head_signed(RECEIPT)
    assert SignedReceipt.decode(head_only.encode()) == head_only
    assert not head_only.is_co_signed


@settings(max_examples=200)
@given(position=st.integers(0, len(SIGNED.encode()) - 1), flip=st.integers(1, 255))
def test_any_changed_byte_is_noticed(position: int, flip: int) -> None:
    raw = bytearray(SIGNED.encode())
    raw[position] ^= flip
    with pytest.raises(ReceiptError):
        decode_and_verify(bytes(raw))


def decode_and_verify(raw: bytes) -> None:
    signed = SignedReceipt.decode(raw)
    verify_head(signed)
    verify_stage(signed)


def test_signatures_do_not_stand_in_for_each_other() -> None:
    alone = WORLD.co_signed(WORLD.receipt(session_id(1), head=1, stage=1))
    verify_head(alone)
    verify_stage(alone)
    with pytest.raises(ReceiptError, match="stage's signature"):
        verify_stage(replace(alone, stage_signature=alone.head_signature))
    with pytest.raises(ReceiptError, match="stage's signature"):
        verify_stage(WORLD.head_signed(RECEIPT))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xa0",
        b"\x80",
        b"\xff" * 100,
        b"\xbf" + b"\x00" * 50,
        b"\xc4\x82\x01\x02",
        b"\x9b" + b"\x7f" * 8,
        b"\x81" * 600,
        b"x" * 100_000,
        SIGNED.encode() + b"\x00",
        SIGNED.encode()[:-1],
        canonical.encode((RECEIPT.encode(), SIGNED.head_signature, b"\x01" * 63)),
        canonical.encode((replace(RECEIPT, version=2).encode(), SIGNED.head_signature, b"")),
        canonical.encode((replace(RECEIPT, end_layer=0).encode(), SIGNED.head_signature, b"")),
        canonical.encode((replace(RECEIPT, num_cached_tokens=11).encode(), SIGNED.head_signature, b"")),
        canonical.encode((replace(RECEIPT, sequence=-1).encode(), SIGNED.head_signature, b"")),
        canonical.encode((replace(RECEIPT, amount_microcredits=2**64).encode(), SIGNED.head_signature, b"")),
    ],
)
def test_hostile_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(ReceiptError):
        SignedReceipt.decode(raw)


def test_a_longer_encoding_of_the_same_number_is_refused() -> None:
    raw = RECEIPT.encode()
    assert raw[:3] == b"\xb2\x00\x01"
    with pytest.raises(ReceiptError, match="canonical"):
        Receipt.decode(b"\xb2\x00\x18\x01" + raw[3:])


def test_an_honest_receipt_is_co_signed() -> None:
    check_against_count(RECEIPT, own_count())
    less = WORLD.receipt(session_id(1), num_output_tokens=5)
    check_against_count(less, own_count(WORLD.receipt(session_id(1))))


@pytest.mark.parametrize("name", ["num_prompt_tokens", "num_cached_tokens", "num_output_tokens"])
def test_one_token_above_the_own_count_is_a_dispute(name: str) -> None:
    own = own_count()
    with pytest.raises(Dispute, match=name):
        check_against_count(RECEIPT, replace(own, **{name: getattr(own, name) - 1}))


def test_a_prompt_that_is_not_fully_signed_is_a_dispute_once_there_is_output() -> None:
    own = replace(own_count(), num_cached_tokens=0)
    with pytest.raises(Dispute, match="num_prompt_tokens"):
        check_against_count(WORLD.receipt(session_id(1), num_prompt_tokens=0), own)
    check_against_count(WORLD.receipt(session_id(1), num_prompt_tokens=4, num_output_tokens=0), own)


@pytest.mark.parametrize("name", ["payer", "key_id", "head", "stage", "session", "pod", "model", "end_layer"])
def test_other_terms_are_a_dispute(name: str) -> None:
    own = own_count()
    other = 11 if name == "end_layer" else b"other"
    with pytest.raises(Dispute, match=name):
        check_against_count(RECEIPT, replace(own, **{name: other}))


def test_a_wrong_price_is_a_dispute() -> None:
    cheap = replace(RECEIPT, amount_microcredits=RECEIPT.amount_microcredits - 1)
    with pytest.raises(Dispute, match="amount"):
        check_against_count(cheap, own_count())
    with pytest.raises(Dispute, match="rate card"):
        check_against_count(replace(RECEIPT, rate_card_version=2), own_count())


def test_the_sequence_rises_and_counts_never_fall() -> None:
    with pytest.raises(Dispute, match="sequence"):
        check_against_count(RECEIPT, own_count(last=RECEIPT))
    longer = WORLD.receipt(session_id(1), sequence=1, num_cached_tokens=3, num_output_tokens=25)
    shorter = replace(RECEIPT, sequence=2)
    with pytest.raises(Dispute, match="num_output_tokens fell"):
        check_against_count(shorter, own_count(longer, last=longer))
