"""Which database holds the ledger: `--db` names one, the state directory remembers it.

A node that is given another takes its entries along, all of them or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from ledger.journal import Journal, JournalError, Record
from ledger.store.sql_journal import SqlJournal, check_database
from node.errors import UserError
from node.home import PodHome

# An absolute path: the state directory is not used from one place only.
KINDS = ("postgresql+psycopg://", "sqlite:////")


def check_database_url(url: str) -> None:
    """Raises UserError for what is no database of ours, or none that answers."""
    if not url.startswith(KINDS):
        raise UserError(f"--db must begin with {' or '.join(KINDS)}")
    try:
        check_database(url)
    except JournalError as error:
        raise UserError(f"--db: {error}") from None


def take_database(home: PodHome, pod: bytes, url: str) -> None:
    """Use this database from now on. Raises UserError, and then the old one stays."""
    if url == home.ledger_url:
        return
    check_database_url(url)
    try:
        with closing(SqlJournal(home.ledger_url, pod)) as old, closing(SqlJournal(url, pod)) as new:
            new.write(_missing(old, new))
    except JournalError as error:
        raise UserError(f"--db: {error}") from None
    home.remember_database(url)


def _missing(old: Journal, new: Journal) -> Iterator[Record]:
    is_empty = new.num_entries() == 0
    for record in old.iterate():
        if is_empty or record.hash not in new.hashes_at(record.author, record.index):
            yield record
