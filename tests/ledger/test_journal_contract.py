"""What every journal adapter must do, run on each of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ledger.journal import Journal, JournalError, Record
from ledger.memory_journal import MemoryJournal
from ledger.store.sql_journal import SqlJournal
from tests.ledger.world import POD

AUTHOR, OTHER = b"a" * 32, b"b" * 32


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Journal]:
    made: Journal
    match request.param:
        case "memory":
            made = MemoryJournal()
        case "sqlite":
            made = SqlJournal(f"sqlite:///{tmp_path}/l.sqlite", POD)
        case _:
            made = SqlJournal(request.getfixturevalue("postgresql").new_database(), POD)
    yield made
    made.close()


def record(index: int, author: bytes = AUTHOR, branch: int = 0) -> Record:
    hash_ = bytes([branch, index % 256, index // 256]).ljust(31, b"h") + author[:1]
    return Record(author, index, hash_, b"p" * 32, b"raw of " + hash_)


def test_a_new_journal_is_empty(journal: Journal) -> None:
    assert list(journal.iterate()) == []
    assert journal.read_range(AUTHOR, 0, 10) == []
    assert journal.hashes_at(AUTHOR, 0) == []
    assert journal.num_entries() == 0
    journal.write([])
    assert journal.num_entries() == 0


def test_iterate_gives_back_everything_in_the_order_written(journal: Journal) -> None:
    first = [record(0), record(0, OTHER), record(1)]
    second = [record(number, OTHER) for number in range(1, 2_500)]
    journal.write(first)
    journal.write(second)
    assert list(journal.iterate()) == [*first, *second]
    assert journal.num_entries() == len(first) + len(second)


def test_read_range_is_of_one_author_in_order_and_bounded(journal: Journal) -> None:
    journal.write([record(2), record(0), record(1, OTHER), record(1), record(3)])
    assert journal.read_range(AUTHOR, 1, 2) == [record(1), record(2)]
    assert journal.read_range(AUTHOR, 3, 9) == [record(3)]
    assert journal.read_range(AUTHOR, 4, 9) == []


def test_both_sides_of_a_fork_are_kept(journal: Journal) -> None:
    journal.write([record(0), record(1)])
    journal.write([record(1, branch=7)])
    assert journal.hashes_at(AUTHOR, 1) == [record(1).hash, record(1, branch=7).hash]
    assert journal.read_range(AUTHOR, 1, 9) == [record(1), record(1, branch=7)]


def test_what_is_written_may_be_read_from_another_journal(journal: Journal) -> None:
    """However long it is, it is there whole or, when the other one fails, not at all."""
    source = MemoryJournal()
    source.write(record(number) for number in range(2_100))

    def failing() -> Iterator[Record]:
        yield from source.iterate()
        raise JournalError("the source is gone")

    with pytest.raises(JournalError, match="the source is gone"):
        journal.write(failing())
    assert journal.num_entries() == 0
    journal.write(source.iterate())
    assert list(journal.iterate()) == list(source.iterate())


def test_a_write_is_all_or_nothing(journal: Journal) -> None:
    journal.write([record(0)])
    with pytest.raises(JournalError):
        journal.write([record(1), record(0)])
    with pytest.raises(JournalError):
        journal.write([record(2), record(2)])
    assert list(journal.iterate()) == [record(0)]
    journal.write([record(1)])
    assert journal.num_entries() == 2
