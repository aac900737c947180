"""A journal in memory, for tests and simulations; forgets everything when it goes."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

from ledger.journal import JournalError, Record


class MemoryJournal:
    def __init__(self) -> None:
        self._records: list[Record] = []
        self._by_hash: dict[bytes, Record] = {}
        self._places: dict[bytes, list[tuple[int, bytes]]] = {}

    def write(self, records: Iterable[Record]) -> None:
        records = tuple(records)
        hashes = {record.hash for record in records}
        if len(hashes) < len(records) or hashes & self._by_hash.keys():
            raise JournalError("an entry is already in the journal")
        for record in records:
            self._records.append(record)
            self._by_hash[record.hash] = record
            insort(self._places.setdefault(record.author, []), (record.index, record.hash))

    def iterate(self) -> Iterator[Record]:
        return iter(tuple(self._records))

    def read_range(self, author: bytes, start_index: int, max_num_records: int) -> list[Record]:
        places = self._places.get(author, [])
        start = bisect_left(places, (start_index, b""))
        return [self._by_hash[hash_] for _, hash_ in places[start : start + max_num_records]]

    def hashes_at(self, author: bytes, index: int) -> list[bytes]:
        places = self._places.get(author, [])
        start, end = bisect_left(places, (index, b"")), bisect_left(places, (index + 1, b""))
        return [hash_ for _, hash_ in places[start:end]]

    def num_entries(self) -> int:
        return len(self._records)

    def close(self) -> None:
        """Nothing to release."""
