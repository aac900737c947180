"""The SQL journal's own promises: append-only by trigger, whose it is, which schema, what survives."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa

from ledger.journal import JournalError
from ledger.store import schema
from ledger.store.sql_journal import SqlJournal
from tests.ledger.test_journal_contract import record
from tests.ledger.world import POD


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "ledger.sqlite"
    journal = SqlJournal(f"sqlite:///{found}", POD)
    journal.write([record(0)])
    journal.close()
    return found


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET raw = x'00'",
        "DELETE FROM entries",
        "UPDATE journal_pod SET pod = x'00'",
        "DELETE FROM journal_pod",
    ],
)
def test_the_database_refuses_changes(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as connection, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)


def test_entries_survive_a_restart(path: Path) -> None:
    journal = SqlJournal(f"sqlite:///{path}", POD)
    assert list(journal.iterate()) == [record(0)]
    journal.close()


def test_the_ledger_of_another_pod_is_refused(path: Path) -> None:
    with pytest.raises(JournalError, match="another pod"):
        SqlJournal(f"sqlite:///{path}", b"Q" * 32)


def test_a_newer_schema_is_refused(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(JournalError, match="newer than this gpu-pod"):
        SqlJournal(f"sqlite:///{path}", POD)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(JournalError, match="not a database"):
        SqlJournal(f"sqlite:///{path}", POD)


def test_a_missing_directory_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="unable to open"):
        SqlJournal(f"sqlite:///{tmp_path}/nowhere/ledger.sqlite", POD)


def test_every_commit_reaches_the_disk(path: Path) -> None:
    engine = schema.connect(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert connection.scalar(sa.text("PRAGMA journal_mode")) == "wal"
        full = 2
        assert connection.scalar(sa.text("PRAGMA synchronous")) == full
    engine.dispose()
