"""The SQL journal's own promises, on SQLite and PostgreSQL: append-only by trigger, whose it is, its schema,
what survives, and one clear line for a database that cannot be used.
"""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import sqlalchemy as sa

from ledger.journal import JournalError
from ledger.ledger import Ledger
from ledger.store import schema, sql_journal
from ledger.store.sql_journal import SqlJournal
from tests.ledger.postgresql import Cluster
from tests.ledger.test_journal_contract import record
from tests.ledger.world import POD, World, raws, session_id

ROOT = Path(__file__).parents[2]


@pytest.fixture
def filled(database_url: str) -> str:
    """A database with one entry in it."""
    journal = SqlJournal(database_url, POD)
    journal.write([record(0)])
    journal.close()
    return database_url


def execute(url: str, statement: str) -> None:
    engine = schema.connect(url)
    try:
        with engine.begin() as connection:
            connection.execute(sa.text(statement))
    finally:
        engine.dispose()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET entry_index = 7",
        "DELETE FROM entries",
        "DELETE FROM entries WHERE entry_index = 0",
        "UPDATE journal_pod SET pod = pod",
        "DELETE FROM journal_pod",
    ],
)
def test_the_database_refuses_changes(filled: str, statement: str) -> None:
    with pytest.raises(sa.exc.DBAPIError, match="append-only"):
        execute(filled, statement)
    journal = SqlJournal(filled, POD)
    assert list(journal.iterate()) == [record(0)]
    journal.close()


def test_postgresql_refuses_to_empty_a_table(postgresql: Cluster) -> None:
    url = postgresql.new_database()
    SqlJournal(url, POD).close()
    with pytest.raises(sa.exc.DBAPIError, match="append-only"):
        execute(url, "TRUNCATE entries")


def test_entries_survive_a_restart(filled: str) -> None:
    journal = SqlJournal(filled, POD)
    assert list(journal.iterate()) == [record(0)]
    journal.close()


def test_the_ledger_of_another_pod_is_refused(filled: str) -> None:
    for to_read in (False, True):
        with pytest.raises(JournalError, match="another pod"):
            SqlJournal(filled, b"Q" * 32, to_read=to_read)


def test_a_newer_schema_is_refused(filled: str) -> None:
    execute(filled, "UPDATE alembic_version SET version_num = '9999'")
    for to_read in (False, True):
        with pytest.raises(JournalError, match="newer than this gpu-pod"):
            SqlJournal(filled, POD, to_read=to_read)


def test_a_reader_beside_the_writer_sees_what_was_written_and_makes_no_database(database_url: str) -> None:
    writer = SqlJournal(database_url, POD)
    reader = SqlJournal(database_url, POD, to_read=True)
    writer.write([record(0)])
    assert list(reader.iterate()) == [record(0)]
    reader.close()
    writer.close()


def test_a_reader_makes_no_schema(postgresql: Cluster) -> None:
    with pytest.raises(JournalError, match="older gpu-pod"):
        SqlJournal(postgresql.new_database(), POD, to_read=True)


def test_two_nodes_do_not_share_a_database(postgresql: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_journal, "_LOCK_WAIT_S", 0.1)
    url = postgresql.new_database()
    first = SqlJournal(url, POD)
    with pytest.raises(JournalError, match="another gpu-pod node uses this database"):
        SqlJournal(url, POD)
    first.close()
    SqlJournal(url, POD).close()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(JournalError, match="not a database"):
        SqlJournal(f"sqlite:///{path}", POD)


def test_a_missing_directory_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="unable to open"):
        SqlJournal(f"sqlite:///{tmp_path}/nowhere/ledger.sqlite", POD)


@pytest.mark.parametrize("url", ["postgresql+psycopg://pod@127.0.0.1:1/ledger", "nonsense", "mysql://a/b"])
def test_a_database_that_cannot_be_reached_is_one_clear_line(url: str) -> None:
    with pytest.raises(JournalError, match="the ledger's database: ") as caught:
        SqlJournal(url, POD)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "address",
    [
        "pod:se@cret@host/ledger",
        "pod:se@cret/word@host/ledger",
        "pod:hush@host:cret/ledger",
        "pod:se@cret:x@h/l",
    ],
)
def test_a_url_that_cannot_be_read_is_not_shown(address: str) -> None:
    with pytest.raises(JournalError, match="this is no database URL") as caught:
        SqlJournal(f"postgresql+psycopg://{address}", POD)
    assert "cret" not in "".join(traceback.format_exception(caught.value))


def test_every_commit_reaches_the_disk(tmp_path: Path) -> None:
    engine = schema.connect(f"sqlite:///{tmp_path}/ledger.sqlite")
    with engine.connect() as connection:
        assert connection.scalar(sa.text("PRAGMA journal_mode")) == "wal"
        full = 2
        assert connection.scalar(sa.text("PRAGMA synchronous")) == full
    engine.dispose()


def reopened_has(world: World, url: str, num_entries: int) -> None:
    ledger = world.ledger(0, url)
    assert ledger.num_entries() == num_entries
    assert ledger.verify() == []
    ledger.close()


def refuses_and_changes_nothing(ledger: Ledger, world: World, reason: str) -> None:
    before = (ledger.digest(), ledger.balances(), ledger.num_entries())
    with pytest.raises(JournalError, match=reason) as caught:
        ledger.append(world.hold(session_id(2)))
    assert len(str(caught.value).splitlines()) == 1
    assert (ledger.digest(), ledger.balances(), ledger.num_entries()) == before


def test_a_read_only_database_is_one_clear_line(tmp_path: Path) -> None:
    world, path = World(), tmp_path / "ledger.sqlite"
    ledger = world.ledger(0, f"sqlite:///{path}")
    ledger.append(world.hold(session_id(1)))
    ledger.close()
    read_only = world.ledger(0, f"sqlite:///file:{path}?mode=ro&uri=true")
    refuses_and_changes_nothing(read_only, world, "readonly database")
    read_only.close()
    reopened_has(world, f"sqlite:///{path}", 1)


def test_a_database_that_another_program_locks_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "_BUSY_TIMEOUT_MS", 100)
    world, path = World(), tmp_path / "ledger.sqlite"
    ledger = world.ledger(0, f"sqlite:///{path}")
    ledger.append(world.hold(session_id(1)))
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        refuses_and_changes_nothing(ledger, world, "database is locked")
        other.execute("ROLLBACK")
    ledger.append(world.hold(session_id(2)))
    ledger.close()
    reopened_has(world, f"sqlite:///{path}", 2)


def test_a_full_disk_is_one_clear_line_and_leaves_what_was_written(tmp_path: Path) -> None:
    script = (
        "from ledger.journal import JournalError; from tests.ledger.world import World, session_id; "
        f"world = World(); ledger = world.ledger(0, 'sqlite:///{tmp_path}/ledger.sqlite')\n"
        "try:\n"
        "    for number in range(1000): ledger.append(world.hold(session_id(number)))\n"
        "except JournalError as error:\n"
        "    print(ledger.num_entries(), sum(ledger.balances().values()), error)"
    )

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    done = subprocess.run(
        [sys.executable, "-B", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=small_files,
    )
    (line,) = done.stdout.splitlines()
    num_entries, total, *reason = line.split(" ", 2)
    assert reason[0].startswith("the ledger's database: ")
    assert int(num_entries) > 0
    assert total == "0"
    reopened_has(World(), f"sqlite:///{tmp_path}/ledger.sqlite", int(num_entries))


def test_a_commit_whose_answer_was_lost_is_no_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server wrote the entry, the node was told of a broken connection: it looks before it goes on."""
    world = World()
    ledger = world.ledger(0, f"sqlite:///{tmp_path}/ledger.sqlite")
    write = SqlJournal.write

    def written_but_not_told(self: SqlJournal, records: object) -> None:
        write(self, records)  # type: ignore[arg-type]
        raise JournalError("the connection was lost")

    with monkeypatch.context() as patched:
        patched.setattr(SqlJournal, "write", written_but_not_told)
        with pytest.raises(JournalError):
            ledger.append(world.hold(session_id(1)))
    ledger.append(world.hold(session_id(2)))
    assert ledger.num_entries() == len(raws(ledger)) == 2
    assert ledger.forks() == []
    assert ledger.verify() == []
    ledger.close()


def test_a_server_that_was_restarted_is_found_again(postgresql: Cluster) -> None:
    world = World()
    ledger = world.ledger(0, postgresql.new_database())
    ledger.append(world.hold(session_id(1)))
    postgresql.stop()
    try:
        refuses_and_changes_nothing(ledger, world, "the ledger's database: ")
    finally:
        postgresql.start()
    ledger.append(world.hold(session_id(2)))
    assert ledger.verify() == []
    assert ledger.num_entries() == 2
    ledger.close()
