"""Golden files of version 1: what is on people's disks and between their nodes, byte for byte, for ever.

Never edit a line of a golden file. A new type of entry gets a new number and new lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ledger import entry as entry_module
from ledger import sync
from ledger.chains import Tip
from ledger.entry import (
    FIRST_PREV_HASH,
    TREASURY,
    AccountOpened,
    Body,
    Disputed,
    DisputeReason,
    Entry,
    EntryError,
    HoldSettled,
    HoldVoided,
    Issued,
    ReceiptClaimed,
    Transferred,
    VoidReason,
    decode_entry,
    sign_entry,
)
from ledger.receipt import ReceiptError, SignedReceipt, verify_head, verify_stage
from tests.ledger.world import KEY_SHOWN, POD, START_MS, World, session_id

GOLDEN = Path(__file__).parent / "golden"
WORLD = World()


def lines(name: str) -> list[bytes]:
    return [bytes.fromhex(line) for line in (GOLDEN / name).read_text().split()]


def variants() -> list[Body]:
    """What `entries_v1.hex` of test_entry.py has not: every reason, empty and full fields, the largest."""
    receipt = WORLD.receipt(session_id(4), num_prompt_tokens=300, num_cached_tokens=256, sequence=2**20)
    return [
        AccountOpened(WORLD.members[0], 2**32 - 1),
        Issued(2**53, b"r" * 64),
        Transferred(WORLD.members[0], WORLD.members[1], 1, b"lunch"),
        replace(WORLD.hold(session_id(4), payer=1), authorization=KEY_SHOWN),
        replace(WORLD.hold(session_id(5)), authorization=b"a" * 1024, rate_card_version=2**21 + 5),
        HoldSettled(session_id(6), 0, 0, 0, ()),
        HoldSettled(session_id(4), 300, 256, 2**40, (WORLD.co_signed(receipt),)),
        *(HoldVoided(session_id(7 + reason), reason) for reason in VoidReason),
        ReceiptClaimed(WORLD.co_signed(receipt)),
        *(Disputed(session_id(4), reason) for reason in DisputeReason),
        Disputed(session_id(4), DisputeReason.TERMS, WORLD.co_signed(receipt)),
        Transferred(TREASURY, WORLD.members[1], 2**53),
    ]


def variant_entries() -> list[Entry]:
    node, prev_hash, found = WORLD.nodes[1], FIRST_PREV_HASH, []
    for index, body in enumerate(variants()):
        time_ms = START_MS + 1_000 * index
        found.append(sign_entry(POD, node.public, index, prev_hash, time_ms, body, node.sign))
        prev_hash = found[-1].hash
    return found


def receipts() -> list[SignedReceipt]:
    plain = WORLD.receipt(session_id(1), num_cached_tokens=3)
    return [WORLD.head_signed(plain), WORLD.co_signed(plain)]


def heads() -> dict[bytes, tuple[Tip, ...]]:
    return {b"a" * 32: (Tip(3, b"x" * 32),), b"b" * 32: (Tip(0, b"y" * 32), Tip(2**40, b"z" * 32))}


def batch() -> list[bytes]:
    return [entry.raw for entry in variant_entries()[:2]]


def test_entries() -> None:
    golden = lines("entries_v1_variants.hex")
    assert [entry.raw for entry in variant_entries()] == golden
    assert [decode_entry(raw).body for raw in golden] == variants()


def test_receipts() -> None:
    golden = lines("receipts_v1.hex")
    assert [signed.encode() for signed in receipts()] == golden
    assert [SignedReceipt.decode(raw) for raw in golden] == receipts()


def test_heads_and_batches() -> None:
    golden = lines("sync_v1.hex")
    assert [sync.encode_heads(heads()), sync.encode_batch(batch())] == golden
    assert sync.decode_heads(golden[0]) == heads()
    assert sync.decode_batch(golden[1]) == tuple(batch())


def test_every_type_of_entry_is_in_a_golden_file() -> None:
    golden = [raw for path in sorted(GOLDEN.glob("entries_*.hex")) for raw in lines(path.name)]
    numbers = {entry_module._body_fields(decode_entry(raw).body)[0] for raw in golden}
    assert numbers == set(entry_module._DECODERS)


def decode_signed_entry(raw: bytes) -> None:
    if not decode_entry(raw).is_signed_by_author():
        raise EntryError("signature does not match")


def decode_signed_receipt(raw: bytes) -> None:
    signed = SignedReceipt.decode(raw)
    verify_head(signed)
    if signed.is_co_signed:
        verify_stage(signed)


@pytest.mark.parametrize(
    ("name", "decode", "error"),
    [
        ("entries_v1.hex", decode_signed_entry, EntryError),
        ("entries_v1_variants.hex", decode_signed_entry, EntryError),
        ("receipts_v1.hex", decode_signed_receipt, ReceiptError),
    ],
)
def test_each_changed_byte_fails(name: str, decode: Callable[[bytes], None], error: type[Exception]) -> None:
    """Every single byte of every golden record, not a sample."""
    for raw in lines(name):
        decode(raw)
        for position in range(len(raw)):
            changed = bytearray(raw)
            changed[position] ^= 1 + position % 255
            with pytest.raises(error):
                decode(bytes(changed))
