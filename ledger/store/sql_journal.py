"""The journal in a SQL database: one table, one transaction per write.

A path of a damaged or foreign database ends in one clear JournalError; nothing is repaired silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import sqlalchemy as sa

from ledger.journal import JournalError, Record
from ledger.store import schema

_READ_AHEAD = 1_000

_metadata = sa.MetaData()
_entries = sa.Table(
    "entries",
    _metadata,
    sa.Column("position", sa.BigInteger, primary_key=True),
    sa.Column("author", sa.LargeBinary),
    sa.Column("entry_index", sa.BigInteger),
    sa.Column("hash", sa.LargeBinary),
    sa.Column("prev_hash", sa.LargeBinary),
    sa.Column("raw", sa.LargeBinary),
)
_pod = sa.Table("journal_pod", _metadata, sa.Column("pod", sa.LargeBinary, primary_key=True))
_record = sa.select(
    _entries.c.author, _entries.c.entry_index, _entries.c.hash, _entries.c.prev_hash, _entries.c.raw
)


class SqlJournal:
    def __init__(self, url: str, pod: bytes) -> None:
        """Open or create the journal of `pod`. Raises JournalError."""
        with _clear_errors():
            self._engine = schema.connect(url)
            schema.upgrade(self._engine)
            self._claim(pod)

    def _claim(self, pod: bytes) -> None:
        with self._engine.begin() as connection:
            owner = connection.scalar(sa.select(_pod.c.pod))
            if owner is None:
                connection.execute(sa.insert(_pod).values(pod=pod))
            elif bytes(owner) != pod:
                raise JournalError(
                    f"this database holds the ledger of another pod ({bytes(owner).hex()[:8]})"
                )

    def write(self, records: Sequence[Record]) -> None:
        rows = [
            {
                "author": record.author,
                "entry_index": record.index,
                "hash": record.hash,
                "prev_hash": record.prev_hash,
                "raw": record.raw,
            }
            for record in records
        ]
        if rows:
            with _clear_errors(), self._engine.begin() as connection:
                connection.execute(sa.insert(_entries), rows)

    def iterate(self) -> Iterator[Record]:
        position = 0
        while True:
            query = sa.select(_entries).where(_entries.c.position > position)
            with _clear_errors(), self._engine.connect() as connection:
                rows = connection.execute(query.order_by(_entries.c.position).limit(_READ_AHEAD)).all()
            if not rows:
                return
            for row in rows:
                yield Record(*row[1:])
            position = rows[-1][0]

    def read_range(self, author: bytes, start_index: int, max_num_records: int) -> list[Record]:
        query = (
            _record.where(_entries.c.author == author, _entries.c.entry_index >= start_index)
            .order_by(_entries.c.entry_index, _entries.c.hash)
            .limit(max_num_records)
        )
        with _clear_errors(), self._engine.connect() as connection:
            return [Record(*row) for row in connection.execute(query)]

    def hashes_at(self, author: bytes, index: int) -> list[bytes]:
        query = sa.select(_entries.c.hash).where(_entries.c.author == author, _entries.c.entry_index == index)
        with _clear_errors(), self._engine.connect() as connection:
            return sorted(bytes(found) for found in connection.scalars(query))

    def num_entries(self) -> int:
        with _clear_errors(), self._engine.connect() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(_entries)) or 0

    def close(self) -> None:
        self._engine.dispose()


@contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except sa.exc.DBAPIError as error:
        raise JournalError(f"the ledger's database: {error.orig}") from error
    except sa.exc.SQLAlchemyError as error:
        raise JournalError(f"the ledger's database: {error}") from error
