"""The state directory read beside a running node, or without one: nothing in it is changed.

The roster's file is read from a copy, because whoever opens it mends what looks half written, and the node
may be writing just then.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from ledger.journal import Journal, JournalError
from ledger.store.sql_journal import SqlJournal
from node.errors import UserError
from node.home import PodHome
from pod.roster.apply import RosterError
from pod.roster.events import EventError
from pod.roster.log import RosterLog
from pod.roster.roster import Roster


@contextmanager
def reading(home: PodHome) -> Iterator[tuple[Roster, Journal]]:
    """Raises UserError, also in place of a JournalError in the block."""
    roster = read_roster(home)
    try:
        with closing(SqlJournal(home.ledger_url, roster.pod, to_read=True)) as journal:
            yield roster, journal
    except JournalError as error:
        raise UserError(str(error)) from None


def read_roster(home: PodHome) -> Roster:
    try:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "roster.log"
            shutil.copyfile(home.roster_file, copy)
            return RosterLog(copy).roster
    except (RosterError, EventError, OSError) as error:
        raise UserError(f"the roster cannot be read: {error}") from None
