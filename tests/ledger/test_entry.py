"""The entry format: round trips, the golden file of version 1, and hostile bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger import canonical
from ledger.entry import (
    FIRST_PREV_HASH,
    MAX_ENTRY_BYTES,
    MAX_TIME_MS,
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
from tests.ledger.world import POD, START_MS, World, session_id

WORLD = World()
GOLDEN = Path(__file__).parent / "golden" / "entries_v1.hex"


def bodies() -> list[Body]:
    first, second = WORLD.receipt(session_id(1)), WORLD.receipt(session_id(1), stage=2, stage_index=1)
    return [
        AccountOpened(WORLD.members[1], 1, b"joined"),
        Issued(5_000_000, b"first"),
        Transferred(TREASURY, WORLD.members[2], 7),
        WORLD.hold(session_id(1)),
        WORLD.settlement(session_id(1), first, second),
        HoldVoided(session_id(2), VoidReason.CANCELLED),
        ReceiptClaimed(WORLD.head_signed(first)),
        Disputed(session_id(1), DisputeReason.COUNTS, WORLD.head_signed(first)),
        Disputed(session_id(3), DisputeReason.UNSIGNED_LIMIT),
    ]


def entries() -> list[Entry]:
    node, prev_hash, found = WORLD.nodes[0], FIRST_PREV_HASH, []
    for index, body in enumerate(bodies()):
        found.append(sign_entry(POD, node.public, index, prev_hash, START_MS + index, body, node.sign))
        prev_hash = found[-1].hash
    return found


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: f"{entry.index}-{type(entry.body).__name__}")
def test_round_trip(entry: Entry) -> None:
    assert decode_entry(entry.raw) == entry
    assert entry.body == bodies()[entry.index]
    assert entry.is_signed_by_author()


def test_golden_entries_of_version_1() -> None:
    """Never edit the file: journals of this format are on people's disks."""
    golden = [bytes.fromhex(line) for line in GOLDEN.read_text().split()]
    assert [entry.raw for entry in entries()] == golden
    assert all(decode_entry(raw).is_signed_by_author() for raw in golden)


@settings(max_examples=300)
@given(data=st.data())
def test_any_changed_byte_is_noticed(data: st.DataObject) -> None:
    entry = data.draw(st.sampled_from(entries()))
    raw = bytearray(entry.raw)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        changed = decode_entry(bytes(raw))
    except EntryError:
        return
    assert not changed.is_signed_by_author()


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_noise_is_refused(raw: bytes) -> None:
    with pytest.raises(EntryError):
        decode_entry(raw)


def rebuilt(**changes: canonical.Value) -> bytes:
    entry = entries()[1]
    fields: dict[str, canonical.Value] = {
        "version": 1,
        "pod": entry.pod,
        "author": entry.author,
        "index": entry.index,
        "prev_hash": entry.prev_hash,
        "type": 2,
        "body": canonical.fields(START_MS, 5, b""),
        "signature": entry.signature,
    }
    return canonical.encode(tuple((fields | changes).values()))


def test_the_rebuilt_entry_is_sound() -> None:
    assert decode_entry(rebuilt()).body == Issued(5)


@pytest.mark.parametrize(
    "raw",
    [
        rebuilt(version=2),
        rebuilt(type=0),
        rebuilt(type=99),
        rebuilt(type=1),
        rebuilt(index=-1),
        rebuilt(index=2**63),
        rebuilt(author=b"short"),
        rebuilt(body=5),
        rebuilt(body=canonical.fields(MAX_TIME_MS + 1, 5, b"")),
        rebuilt(body=canonical.fields(START_MS, -5, b"")),
        rebuilt(body=canonical.fields(START_MS, 2**54, b"")),
        rebuilt(body=canonical.fields(START_MS, 5, b"x" * 65)),
        rebuilt(body=canonical.fields(START_MS, 5, b"", b"")),
        rebuilt(body=canonical.fields(START_MS, True, b"")),
        rebuilt(type=3, body=canonical.fields(START_MS, b"issuance", TREASURY, 5, b"")),
        rebuilt(type=6, body=canonical.fields(START_MS, session_id(1), 77)),
        rebuilt() + b"\x00",
        b"\xa8" + b"\x00" * MAX_ENTRY_BYTES,
    ],
)
def test_malformed_entries_are_refused(raw: bytes) -> None:
    with pytest.raises(EntryError):
        decode_entry(raw)


def test_an_own_entry_past_the_limits_is_not_made() -> None:
    node = WORLD.nodes[0]
    signed = WORLD.co_signed(WORLD.receipt(session_id(1)))
    long_hold = replace(WORLD.hold(session_id(1)), authorization=bytes(1025))
    for body in (long_hold, Issued(-1), Issued(2**60), HoldSettled(session_id(1), 1, 0, 1, (signed,) * 129)):
        with pytest.raises(EntryError):
            sign_entry(POD, node.public, 0, FIRST_PREV_HASH, START_MS, body, node.sign)
