"""A journal as transactions: what each entry moved between which accounts, in the order of the journal.

The postings are those of the books, so they are what `pod ledger` shows. An entry may move credit of sessions
before its own, because entries arrive in any order; all together they always add up to the balances.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ledger.books import Books, Posting, UnknownPartyError
from ledger.directory import Directory
from ledger.entry import Entry, EntryError, HoldOpened, HoldSettled, HoldVoided, ReceiptClaimed, decode_entry
from ledger.journal import Journal


@dataclass(frozen=True, slots=True)
class Transaction:
    """One entry and its postings, which sum to 0; none when it moved nothing.

    `session`, `payer` and `model` are empty for entries of no session.
    """

    entry: Entry
    postings: tuple[Posting, ...]
    session: bytes = b""
    payer: bytes = b""
    model: bytes = b""

    def concerns(self, account: bytes) -> bool:
        return self.payer == account or any(posting.account == account for posting in self.postings)


class Transactions:
    """Read once, by `iterate`; afterwards `balances` are those of the whole journal."""

    def __init__(self, journal: Journal, directory: Directory) -> None:
        self._journal = journal
        self._books = Books(directory)

    def iterate(self) -> Iterator[Transaction]:
        """Leaves out what the books leave out: damaged entries and those of parties nobody knows."""
        for record in self._journal.iterate():
            try:
                entry = decode_entry(record.raw)
                postings = self._books.apply(entry)
            except (EntryError, UnknownPartyError):
                continue
            moved = tuple(posting for posting in postings if posting.amount_microcredits)
            yield Transaction(entry, moved, *self._session_of(entry))

    def balances(self) -> dict[bytes, int]:
        return self._books.balances()

    def _session_of(self, entry: Entry) -> tuple[bytes, bytes, bytes]:
        """(session, payer, model)"""
        match entry.body:
            case HoldOpened(session=session, payer=payer, model=model):
                return session, payer, model
            case HoldSettled(session=session) | HoldVoided(session=session):
                hold = next(iter(self._books.holds_of(entry.author, session)), None)
                return (session, hold.payer, hold.model) if hold is not None else (session, b"", b"")
            case ReceiptClaimed(receipt=signed):
                return signed.receipt.session, signed.receipt.payer, signed.receipt.model
            case _:
                return b"", b"", b""
