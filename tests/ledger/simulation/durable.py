"""Journals that a crash leaves behind: a write may die before, in, or after its transaction, or find no room.

What the crashed process knew is gone; the next one sees what was durable. SQLite files are copied at the
moment of the crash, with the transaction still open, as a machine that lost its power would find them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import sqlalchemy as sa

from ledger.journal import Journal, JournalError, Record
from ledger.memory_journal import MemoryJournal
from ledger.store.sql_journal import SqlJournal
from tests.ledger.world import POD


class Crash(Enum):
    BEFORE = "before"
    IN = "in"
    AFTER = "after"
    # No crash: the write fails, the process lives on.
    DISK_FULL = "disk full"


class Died(Exception):
    """The process is gone in the middle of a write; whoever catches this starts a new one."""


class MortalJournal:
    """A journal whose writes may be the process's last. `crash()` is asked before each write."""

    def __init__(self, disk: Disk, durable: Journal, crash: Callable[[], Crash | None]) -> None:
        self._disk = disk
        self._durable = durable
        self._crash = crash

    def write(self, records: Sequence[Record]) -> None:
        crash = self._crash() if records else None
        if crash is Crash.DISK_FULL:
            raise JournalError("the disk is full")
        if crash is Crash.IN:
            self._disk.interrupt(self._durable, records)
        elif crash is not Crash.BEFORE:
            self._durable.write(records)
        if crash is not None:
            raise Died

    def __getattr__(self, name: str) -> object:
        # Reads, and whatever else a journal offers, are the durable one's own.
        return getattr(self._durable, name)


class Disk:
    """What is durable of one node over its lives: in memory, or SQLite files in `folder`."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._num_lives = 0
        self._journal: Journal | None = None if folder is not None else MemoryJournal()

    def open(self, crash: Callable[[], Crash | None]) -> MortalJournal:
        """The journal of the node's next life."""
        if self._folder is not None:
            self._next_life(self._folder)
        assert self._journal is not None
        return MortalJournal(self, self._journal, crash)

    def interrupt(self, journal: Journal, records: Sequence[Record]) -> None:
        """Write, but for the commit; in memory a transaction that was not committed leaves nothing."""
        if self._folder is not None:
            target = self._path(self._folder, self._num_lives + 1)
            with _copied_instead_of_committed(self._path(self._folder, self._num_lives), target):
                journal.write(records)

    def _next_life(self, folder: Path) -> None:
        if self._journal is not None:
            target = self._path(folder, self._num_lives + 1)
            if not target.exists():
                _copy(self._path(folder, self._num_lives), target)
            self._journal.close()
        self._num_lives += 1
        self._journal = SqlJournal(f"sqlite:///{self._path(folder, self._num_lives)}", POD)

    def _path(self, folder: Path, life: int) -> Path:
        return folder / f"life{life}.sqlite"

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()


class _Interrupted(Exception):
    pass


@contextmanager
def _copied_instead_of_committed(source: Path, target: Path) -> Iterator[None]:
    def interrupt(_: sa.Connection) -> None:
        _copy(source, target)
        raise _Interrupted

    sa.event.listen(sa.Engine, "commit", interrupt)
    try:
        yield
        raise AssertionError("the write was committed")
    except _Interrupted:
        return
    finally:
        sa.event.remove(sa.Engine, "commit", interrupt)


def _copy(source: Path, target: Path) -> None:
    for suffix in ("", "-wal"):
        found = source.with_name(source.name + suffix)
        if found.exists():
            shutil.copy(found, target.with_name(target.name + suffix))
