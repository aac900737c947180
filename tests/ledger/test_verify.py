"""The audit finds every changed byte, also when whoever changed it went around the triggers."""

from __future__ import annotations

import shutil
import sqlite3
from hashlib import sha256
from pathlib import Path

import pytest

from ledger.entry import (
    FIRST_PREV_HASH,
    AccountOpened,
    HoldVoided,
    Issued,
    VoidReason,
    decode_entry,
    sign_entry,
)
from ledger.journal import Record
from ledger.ledger import Ledger
from ledger.memory_journal import MemoryJournal
from ledger.rate_card import DEFAULT_RATE_CARD
from ledger.receipt import Receipt
from ledger.verify import verify_journal
from tests.ledger.world import POD, START_MS, World, session_id

WORLD = World()
NODE = WORLD.nodes[0]
NAME = NODE.public.hex()[:8]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    ledger = WORLD.ledger(0, f"sqlite:///{path}")
    ledger.append(AccountOpened(WORLD.members[0], 1))
    for number in range(3):
        ledger.append(WORLD.hold(session_id(number)))
        ledger.append(WORLD.settlement(session_id(number), WORLD.receipt(session_id(number))))
    ledger.append(Issued(5))
    assert ledger.verify() == []
    ledger.close()
    return path


@pytest.fixture
def copied(original: Path, tmp_path: Path) -> Path:
    path = tmp_path / "copied.sqlite"
    shutil.copy(original, path)
    with sqlite3.connect(path) as connection:
        for (trigger,) in connection.execute(
            "SELECT name FROM sqlite_master WHERE type='trigger'"
        ).fetchall():
            connection.execute(f"DROP TRIGGER {trigger}")
    return path


def opened(path: Path) -> Ledger:
    return WORLD.ledger(0, f"sqlite:///{path}")


def raw_of(path: Path, index: int) -> bytes:
    with sqlite3.connect(path) as connection:
        found = connection.execute("SELECT raw FROM entries WHERE entry_index = ?", (index,)).fetchone()[0]
    return bytes(found)


def overwrite(path: Path, index: int, raw: bytes, with_hash: bool = False) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE entries SET raw = ? WHERE entry_index = ?", (raw, index))
        if with_hash:
            hash_ = sha256(raw).digest()
            connection.execute("UPDATE entries SET hash = ? WHERE entry_index = ?", (hash_, index))


def reasons(path: Path, index: int) -> list[str]:
    ledger = opened(path)
    found = [str(violation) for violation in ledger.verify()]
    ledger.close()
    return [reason for reason in found if reason.startswith(f"entry {index} of {NAME}: ")]


@pytest.mark.parametrize("index", [0, 1, 2, 7])
def test_any_flipped_byte_names_the_entry(copied: Path, index: int) -> None:
    raw = raw_of(copied, index)
    for position in range(0, len(raw), 17):
        flipped = raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :]
        overwrite(copied, index, flipped)
        assert reasons(copied, index), f"byte {position}"
    overwrite(copied, index, raw)
    assert opened(copied).verify() == []


def test_a_changed_byte_with_a_matching_hash_fails_by_its_signature(copied: Path) -> None:
    raw = raw_of(copied, 7)
    flipped = raw[:-1] + bytes([raw[-1] ^ 1])
    assert decode_entry(flipped).index == 7
    overwrite(copied, 7, flipped, with_hash=True)
    assert reasons(copied, 7) == [f"entry 7 of {NAME}: signature does not match"]


def test_an_entry_changed_with_its_hash_breaks_the_chain_behind_it(copied: Path) -> None:
    node = WORLD.nodes[0]
    genuine = decode_entry(raw_of(copied, 3))
    resigned = sign_entry(
        POD,
        node.public,
        3,
        genuine.prev_hash,
        START_MS,
        WORLD.hold(session_id(1), amount_microcredits=9_000_000),
        node.sign,
    )
    overwrite(copied, 3, resigned.raw, with_hash=True)
    assert reasons(copied, 3) == []
    assert reasons(copied, 4) == [f"entry 4 of {NAME}: the entry before it is missing or another one"]


def test_a_changed_hash_beside_a_sound_entry_is_noticed(copied: Path) -> None:
    with sqlite3.connect(copied) as connection:
        connection.execute("UPDATE entries SET hash = ? WHERE entry_index = 7", (b"h" * 32,))
    assert reasons(copied, 7) == [f"entry 7 of {NAME}: its bytes are not those of its stored hash"]


def test_a_removed_entry_is_noticed(copied: Path) -> None:
    with sqlite3.connect(copied) as connection:
        connection.execute("DELETE FROM entries WHERE entry_index = 6")
    assert reasons(copied, 7) == [f"entry 7 of {NAME}: the entry before it is missing or another one"]


def test_entries_that_changed_places_are_noticed(copied: Path) -> None:
    first, second = raw_of(copied, 1), raw_of(copied, 3)
    overwrite(copied, 1, second)
    overwrite(copied, 3, first)
    for index in (1, 3):
        assert f"entry {index} of {NAME}: it is stored in another entry's place" in reasons(copied, index)


def test_a_damaged_journal_still_opens_and_says_so(copied: Path) -> None:
    overwrite(copied, 2, b"\x00" * 50)
    ledger = opened(copied)
    assert ledger.num_not_applied() == 1
    assert sum(ledger.balances().values()) == 0
    assert any("entry 2" in str(violation) for violation in ledger.verify())
    ledger.close()


def violations_of(*bodies: object) -> list[str]:
    """Verify a journal written by a node that ignores the rules."""
    journal, prev_hash = MemoryJournal(), FIRST_PREV_HASH
    for index, body in enumerate(bodies):
        entry = sign_entry(POD, NODE.public, index, prev_hash, START_MS, body, NODE.sign)  # type: ignore[arg-type]
        journal.write([Record.of(entry)])
        prev_hash = entry.hash
    return [str(violation) for violation in verify_journal(journal, POD, WORLD.directory)]


def receipt(**changes: int) -> Receipt:
    return WORLD.receipt(session_id(1), **changes)


def test_lies_in_well_signed_entries_are_named() -> None:
    hold, void = WORLD.hold(session_id(1)), HoldVoided(session_id(1), VoidReason.FAILED)
    assert violations_of(hold, WORLD.settlement(session_id(1), receipt(amount_microcredits=5))) == [
        f"entry 1 of {NAME}: a receipt's amount is not the price of its counts"
    ]
    assert violations_of(hold, WORLD.settlement(session_id(1), receipt(payer=1))) == [
        f"entry 1 of {NAME}: a receipt's payer or key is not the hold's"
    ]
    assert violations_of(hold, void, WORLD.settlement(session_id(1), receipt())) == [
        f"entry 2 of {NAME}: its hold was already resolved by entry 1"
    ]
    assert violations_of(hold, hold) == [f"entry 1 of {NAME}: its hold was already opened by entry 0"]
    assert violations_of(void) == [f"entry 0 of {NAME}: its author opened no such hold"]


def test_an_unknown_rate_card_is_a_violation_not_a_crash() -> None:
    world = World()
    world.directory.cards[2] = DEFAULT_RATE_CARD
    ledger = world.ledger()
    ledger.append(AccountOpened(world.members[0], 2))
    del world.directory.cards[2]
    assert {str(violation) for violation in ledger.verify()} == {
        f"entry 0 of {NAME}: rate card 2 is not known"
    }
