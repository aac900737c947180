"""`pod backup` and `pod restore`: identity, roster and journal of a state directory in one sealed file.

A restored node does not go on with its old journal: what it wrote after the backup may be known elsewhere,
and saying something else in its place would be a fork. `journal_guard.py` gives it a new one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from ledger.entry import EntryError, decode_entry
from ledger.journal import Journal, JournalError, Record
from ledger.store.sql_journal import SqlJournal
from node import backup_file
from node.backup_file import BackupError, Kind
from node.beside import reading
from node.database import check_database_url
from node.errors import UserError
from node.home import PodHome
from node.private_file import written_whole
from pod.identity import IdentityError
from pod.membership import Membership, MembershipError
from pod.roster.apply import RosterError
from pod.roster.events import EventError

MIN_PASSPHRASE_CHARACTERS = 8
_NAME = re.compile(r"(keys/)?[A-Za-z0-9_-][A-Za-z0-9._-]{0,80}")


def back_up(home: PodHome, target: Path, passphrase: str) -> dict[str, object]:
    """Beside a running node or without one. Raises UserError; then there is no new file."""
    if len(passphrase) < MIN_PASSPHRASE_CHARACTERS:
        raise UserError(f"the passphrase must have at least {MIN_PASSPHRASE_CHARACTERS} characters")
    num_entries = 0

    def records(journal: Journal) -> Iterator[tuple[Kind, bytes]]:
        nonlocal num_entries
        # The journal last: whoever wrote in it is in the roster that was read before, or joined since.
        for path in home.identity_files():
            name = path.relative_to(home.path).as_posix()
            # What editors and file managers leave in keys/ is nothing of ours, and no restore would take it.
            if _NAME.fullmatch(name):
                yield Kind.FILE, name.encode() + b"\0" + path.read_bytes()
        for record in journal.iterate():
            num_entries += 1
            yield Kind.ENTRY, record.raw

    with reading(home) as (roster, journal), written_whole(target) as file:
        backup_file.write(file, passphrase, records(journal))
    return {"file": str(target), "pod_name": roster.name, "num_entries": num_entries}


def restore(home: PodHome, source: Path, passphrase: str, database: str | None) -> dict[str, object]:
    """Into a state directory that is in no pod. Raises UserError; then nothing has changed."""
    home.check_has_no_pod()
    if database is not None:
        check_database_url(database)
    home.acquire_for_new_pod()
    staging = home.path / "restoring"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        # All of it is checked before anything is written.
        _check(source, passphrase)
        staging.mkdir(mode=0o700)
        try:
            return _restore(home, PodHome(staging), source, passphrase, database)
        except (BackupError, EntryError, RosterError, EventError, IdentityError, MembershipError) as error:
            raise UserError(f"{source}: {error}") from None
        except JournalError as error:
            raise UserError(str(error)) from None
        except OSError as error:
            raise UserError(f"the backup cannot be restored to {home.path}: {error.strerror}") from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        home.release()


def _check(source: Path, passphrase: str) -> None:
    try:
        with source.open("rb") as file:
            for _ in backup_file.read(file, passphrase):
                pass
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from None
    except BackupError as error:
        raise UserError(f"{source}: {error}") from None


def _restore(
    home: PodHome, staging: PodHome, source: Path, passphrase: str, database: str | None
) -> dict[str, object]:
    _write_files(staging.path, source, passphrase)
    membership = Membership.open(staging.path)
    url = database or staging.default_ledger_url
    with closing(SqlJournal(url, membership.pod)) as journal:
        if journal.num_entries():
            raise UserError("--db: this database holds a ledger already; a backup needs an empty one")
        journal.write(_entries(source, passphrase))
        num_entries = journal.num_entries()
    if database is not None:
        staging.remember_database(database)
    staging.mark_restored()
    home.take_over(staging)
    return {
        "pod_name": membership.roster.name,
        "node": membership.node_id.hex(),
        "num_entries": num_entries,
        "home": str(home.path),
    }


def _write_files(target: Path, source: Path, passphrase: str) -> None:
    with source.open("rb") as file:
        for kind, content in backup_file.read(file, passphrase):
            if kind is not Kind.FILE:
                continue
            name, _, data = content.partition(b"\0")
            text = name.decode("ascii", "replace")
            if not _NAME.fullmatch(text):
                raise BackupError(f"it holds a file of the name {text!r}")
            with written_whole(_in_private_directory(target / text)) as written:
                written.write(data)


def _in_private_directory(path: Path) -> Path:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    return path


def _entries(source: Path, passphrase: str) -> Iterator[Record]:
    with source.open("rb") as file:
        for kind, content in backup_file.read(file, passphrase):
            if kind is Kind.ENTRY:
                yield Record.of(decode_entry(content))
