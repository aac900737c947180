"""The journal in a SQL database: one table, one transaction per write.

A path of a damaged or foreign database ends in one clear JournalError; nothing is repaired silently.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import sqlalchemy as sa

from ledger.journal import JournalError, Record
from ledger.store import schema

_READ_AHEAD = 1_000
_WRITE_AT_ONCE = 1_000
# The server may need a moment to see that a killed node is gone.
_LOCK_WAIT_S = 5.0

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
# Any number will do that other programs are unlikely to lock in the same database.
_LOCK_NUMBER = 0x67_70_75_70_6F_64


class SqlJournal:
    def __init__(self, url: str, pod: bytes, *, to_read: bool = False) -> None:
        """Open or create the journal of `pod`. Raises JournalError.

        `to_read`: beside a process that writes; the database must exist, and nothing in it is changed.
        """
        self._lock: sa.Connection | None = None
        with _clear_errors():
            self._engine = schema.connect(url)
            try:
                if to_read:
                    schema.check(self._engine)
                else:
                    self._lock_out_others()
                    schema.upgrade(self._engine)
                self._claim(pod, to_read)
            except BaseException:
                self.close()
                raise

    def _lock_out_others(self) -> None:
        """Two nodes that write to one database would not know of each other's entries.

        The lock goes with the connection, also after kill -9. An SQLite file is below its node's own lock.
        """
        if self._engine.dialect.name != "postgresql":
            return
        self._lock = self._engine.connect()
        deadline_s = time.monotonic() + _LOCK_WAIT_S
        while not self._lock.scalar(sa.select(sa.func.pg_try_advisory_lock(_LOCK_NUMBER))):
            if time.monotonic() > deadline_s:
                raise JournalError(
                    "another gpu-pod node uses this database now; each node needs a database of its own"
                )
            time.sleep(0.05)
        self._lock.commit()

    def _claim(self, pod: bytes, to_read: bool) -> None:
        with self._engine.begin() as connection:
            owner = connection.scalar(sa.select(_pod.c.pod))
            if owner is not None and bytes(owner) != pod:
                raise JournalError(
                    f"this database holds the ledger of another pod ({bytes(owner).hex()[:8]})"
                )
            if owner is None and not to_read:
                connection.execute(sa.insert(_pod).values(pod=pod))

    def write(self, records: Iterable[Record]) -> None:
        pending = iter(records)
        rows = _rows(pending)
        if not rows:
            return
        with _clear_errors(), self._engine.begin() as connection:
            while rows:
                connection.execute(sa.insert(_entries), rows)
                rows = _rows(pending)

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
        if self._lock is not None:
            self._lock.close()
        self._engine.dispose()


def check_database(url: str) -> None:
    """Raise JournalError when the database cannot be reached. Creates and changes nothing on a server."""
    with _clear_errors():
        engine = schema.connect(url)
        if engine.dialect.name == "sqlite":
            return
        try:
            engine.connect().close()
        finally:
            engine.dispose()


def _rows(records: Iterator[Record]) -> list[dict[str, object]]:
    return [
        {
            "author": record.author,
            "entry_index": record.index,
            "hash": record.hash,
            "prev_hash": record.prev_hash,
            "raw": record.raw,
        }
        for record in islice(records, _WRITE_AT_ONCE)
    ]


@contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except sa.exc.DBAPIError as error:
        raise JournalError(f"the ledger's database: {_one_line(error.orig)}") from error
    except (sa.exc.SQLAlchemyError, ImportError) as error:
        raise JournalError(f"the ledger's database: {_one_line(error)}") from error


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split())
