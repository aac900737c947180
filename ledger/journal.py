"""The journal as a port: an append-only store of raw entries of all authors, written in whole batches.

It keeps bytes and where they stand; it checks nothing, and every adapter passes the same contract tests.
Two entries with one author and index (a fork) are both kept: together they are the proof.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from ledger.entry import Entry


class JournalError(Exception):
    """The store cannot be opened, read or written; one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Record:
    """A raw entry and the place it is stored under."""

    author: bytes
    index: int
    hash: bytes
    prev_hash: bytes
    raw: bytes = field(repr=False)

    @staticmethod
    def of(entry: Entry) -> Record:
        return Record(entry.author, entry.index, entry.hash, entry.prev_hash, entry.raw)


class Journal(Protocol):
    def write(self, records: Iterable[Record]) -> None:
        """Append all or, on JournalError, nothing. Durable on return. The caller writes no hash twice."""

    def iterate(self) -> Iterator[Record]:
        """Everything, in the order written."""

    def read_range(self, author: bytes, start_index: int, max_num_records: int) -> list[Record]:
        """Records of `author` from `start_index` on, by (index, hash)."""

    def hashes_at(self, author: bytes, index: int) -> list[bytes]:
        """Hashes of the entries at that place, sorted: none, one, or more in a fork."""

    def num_entries(self) -> int: ...

    def close(self) -> None: ...
