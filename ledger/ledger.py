"""The ledger of one node: its own journal to append to, everyone's to take in, and the books over all.

An entry is checked, then written to the journal, then applied to the books; nothing is applied that is not
durable. Every method is synchronous and safe to call from any thread: one writes at a time, and while it
waits for the disk others read the books as they were before. It knows no network: sync is `heads`, `missing`
and `ingest`, and whoever owns a connection carries the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from threading import RLock

from ledger import sync
from ledger.books import Books, MemberTotals, SessionSummary, UnknownPartyError
from ledger.chains import MAX_NUM_BRANCHES, Chain, Fork, Tip
from ledger.directory import Directory
from ledger.dividends import Period
from ledger.entry import (
    FIRST_PREV_HASH,
    Body,
    Entry,
    EntryError,
    HoldOpened,
    HoldSettled,
    HoldVoided,
    decode_entry,
    sign_entry,
)
from ledger.ingest import Draft, IngestResult
from ledger.journal import Journal, JournalError, Record
from ledger.key_use import KeyUse
from ledger.memory_journal import MemoryJournal
from ledger.receipt import Receipt, Sign
from ledger.rules import EntryRefused, check_entry
from ledger.session_record import Hold
from ledger.store.sql_journal import SqlJournal
from ledger.treasury import TreasuryTotals
from ledger.verify import Violation, verify_journal

MEMORY_URL = "memory:"


class LedgerError(Exception):
    """The entry was not written; the message is one line that says why. Nothing has changed."""


class Ledger:
    def __init__(
        self,
        journal: Journal,
        pod: bytes,
        directory: Directory,
        author_public_key: bytes,
        sign: Sign,
        clock_ms: Callable[[], int],
    ) -> None:
        """Replays the journal. `sign` signs with the key of `author_public_key`; `clock_ms` is wall time."""
        self._journal = journal
        self._pod = pod
        self._directory = directory
        self._author = author_public_key
        self._sign = sign
        self._clock_ms = clock_ms
        # Writers hold `_writing` all the time, and `_lock` beside it only while books and chains change: the
        # event loop reads under `_lock`, and a database may take its time. Either lock is enough to read.
        self._writing = RLock()
        self._lock = RLock()
        self._is_uncertain = False
        self._replay()

    @classmethod
    def open(
        cls,
        url: str,
        pod: bytes,
        directory: Directory,
        author_public_key: bytes,
        sign: Sign,
        clock_ms: Callable[[], int],
    ) -> Ledger:
        """Open or create the ledger at an SQLAlchemy URL or `memory:`. Raises JournalError."""
        journal: Journal = MemoryJournal() if url == MEMORY_URL else SqlJournal(url, pod)
        return cls(journal, pod, directory, author_public_key, sign, clock_ms)

    def close(self) -> None:
        with self._writing, self._lock:
            self._journal.close()

    def _replay(self) -> None:
        books, chains = Books(self._directory), dict[bytes, Chain]()
        num_entries = num_not_applied = 0
        for record in self._journal.iterate():
            num_entries += 1
            chain = chains.setdefault(record.author, Chain(record.author))
            chain.extend(record.index, record.hash, record.prev_hash)
            try:
                if sha256(record.raw).digest() != record.hash:
                    raise EntryError("the stored bytes have changed")
                books.apply(decode_entry(record.raw, was_checked=True))
            except (EntryError, UnknownPartyError):
                num_not_applied += 1
        books.sort_recent()
        with self._lock:
            self._books, self._chains, self._num_entries = books, chains, num_entries
            # How far below its last entry an author's head is advertised, to find where a branch left ours.
            self._rewinds: dict[bytes, int] = {}
            # Stored entries that the books could not take in; `verify` names them.
            self._num_not_applied = num_not_applied

    def rebuild(self) -> None:
        """Make the books anew from the journal, e.g. after the directory learned of more nodes."""
        with self._writing:
            self._replay()

    # Writing

    def append(self, body: Body) -> Entry:
        """Sign, store and apply this node's next entry. Raises LedgerError or JournalError."""
        with self._writing:
            self._learn_what_was_written()
            self._learn_rate_cards()
            chain = self._chains.get(self._author) or Chain(self._author)
            if chain.is_forked:
                raise LedgerError(
                    "this node's journal has forked (its key was used twice): it needs a new key"
                )
            self._check_hold_is_unresolved(body)
            last = chain.last
            index, prev_hash = (last.index + 1, last.hash) if last else (0, FIRST_PREV_HASH)
            try:
                entry = sign_entry(
                    self._pod, self._author, index, prev_hash, self._clock_ms(), body, self._sign
                )
                check_entry(entry, self._pod, self._directory, self._books.holds_of, is_signed_here=True)
            except (EntryError, EntryRefused) as error:
                raise LedgerError(f"{type(body).__name__} refused: {error}") from error
            chain = chain.copy()
            chain.extend(entry.index, entry.hash, entry.prev_hash)
            self._commit([entry], {self._author: chain}, {})
            return entry

    def _learn_what_was_written(self) -> None:
        """After a failed write: a server that was lost while it committed may hold the entries all the same.

        Who went on without looking would write a second entry in the place of the first.
        """
        if self._is_uncertain:
            if self._journal.num_entries() != self._num_entries:
                self._replay()
            self._is_uncertain = False

    def _learn_rate_cards(self) -> None:
        """Only where a rate card's version was given a second content does anything change here."""
        if self._books.has_stale_cards():
            self._replay()

    def _check_hold_is_unresolved(self, body: Body) -> None:
        match body:
            case HoldOpened(session=session):
                if self._books.holds_of(self._author, session):
                    raise LedgerError("HoldOpened refused: this session has a hold already")
            case HoldSettled(session=session) | HoldVoided(session=session):
                if self._books.is_resolved(self._author, session):
                    raise LedgerError(f"{type(body).__name__} refused: its hold is resolved already")
            case _:
                pass

    def _commit(
        self, entries: Sequence[Entry], chains: Mapping[bytes, Chain], rewinds: Mapping[bytes, int]
    ) -> None:
        try:
            self._journal.write([Record.of(entry) for entry in entries])
        except JournalError:
            self._is_uncertain = True
            raise
        with self._lock:
            self._num_entries += len(entries)
            self._chains.update(chains)
            self._rewinds.update(rewinds)
            for entry in entries:
                self._books.apply(entry)

    def ingest(self, raws: Iterable[bytes]) -> IngestResult:
        """Take in others' entries, in any order, doubled or not, in one database transaction.

        An entry that breaks a rule or lacks its predecessor is refused by itself. Raises JournalError.
        """
        with self._writing:
            self._learn_what_was_written()
            self._learn_rate_cards()
            draft = Draft(self._pod, self._directory, self._journal, self._books, self._chains, self._rewinds)
            draft.offer_all(raws)
            self._commit(draft.accepted, draft.chains, draft.rewinds)
            forks = tuple(self._fork(author, index) for author, index in sorted(draft.forked))
            return IngestResult(len(draft.accepted), tuple(draft.refused), forks)

    # Sync

    def heads(self) -> dict[bytes, tuple[Tip, ...]]:
        """The last entries held of each author: what a peer's `missing` wants to know."""
        with self._lock:
            return {author: self._advertised(chain) for author, chain in self._chains.items() if chain.tips}

    def _advertised(self, chain: Chain) -> tuple[Tip, ...]:
        rewind = self._rewinds.get(chain.author, 0)
        last = chain.last
        # With no room for another branch, looking for where one left ours is of no use.
        if not rewind or last is None or len(chain.tips) >= MAX_NUM_BRANCHES:
            return chain.sorted_tips()
        index = max(0, last.index - rewind)
        return tuple(Tip(index, hash_) for hash_ in self._journal.hashes_at(chain.author, index))

    def missing(self, heads: sync.Heads, max_bytes: int) -> tuple[list[bytes], bool]:
        """Raw entries that a replica with these heads lacks, about `max_bytes`, and whether more are."""
        with self._lock:
            return sync.missing(self._journal, self._chains, heads, max_bytes)

    def digest(self) -> bytes:
        """Equal on two replicas if and only if they hold the same entries."""
        with self._lock:
            return sync.digest(
                {author: chain.sorted_tips() for author, chain in self._chains.items() if chain.tips}
            )

    def last_entry(self, author: bytes) -> bytes:
        """The end of the author's longest branch; empty when nothing of it is here."""
        with self._lock:
            chain = self._chains.get(author)
            last = chain.last if chain is not None else None
            if last is None:
                return b""
            records = self._journal.read_range(author, last.index, MAX_NUM_BRANCHES + 1)
            return next(record.raw for record in records if record.hash == last.hash)

    def is_own_but_unknown(self, raw: bytes) -> bool:
        """Whether this is proof that this node's journal goes on where this ledger ends, or beside it."""
        try:
            entry = decode_entry(raw)
        except EntryError:
            return False
        if (entry.pod, entry.author) != (self._pod, self._author) or not entry.is_signed_by_author():
            return False
        with self._lock:
            return entry.hash not in self._journal.hashes_at(self._author, entry.index)

    def num_entries(self) -> int:
        with self._lock:
            return self._num_entries

    def num_not_applied(self) -> int:
        """Stored entries that are damaged or name an unknown party; 0 in a sound ledger."""
        with self._lock:
            return self._num_not_applied

    def forks(self) -> list[Fork]:
        with self._lock:
            places = [
                (author, index) for author, chain in self._chains.items() for index in chain.branch_indexes
            ]
            return [self._fork(author, index) for author, index in sorted(places)]

    def _fork(self, author: bytes, index: int) -> Fork:
        return Fork(author, index, tuple(self._journal.hashes_at(author, index)))

    def is_frozen(self, author: bytes) -> bool:
        """Whether the author signed two histories; a frozen node should be given no work."""
        with self._lock:
            chain = self._chains.get(author)
            return chain is not None and chain.is_forked

    def frozen_authors(self) -> frozenset[bytes]:
        """All of whom two histories are here, each with its proof in `forks`."""
        with self._lock:
            return frozenset(author for author, chain in self._chains.items() if chain.is_forked)

    # Reading

    def balances(self) -> dict[bytes, int]:
        with self._lock:
            return self._books.balances()

    def balance(self, account: bytes) -> int:
        with self._lock:
            return self._books.balance(account)

    def available(self, account: bytes) -> int:
        """Balance less open holds, in microcredits."""
        with self._lock:
            return self._books.available(account, self._clock_ms())

    def is_account_open(self, member: bytes) -> bool:
        """Whether the member has had the starter grant."""
        with self._lock:
            return self._books.is_account_open(member)

    def open_holds(self) -> list[Hold]:
        """Holds neither settled nor voided nor past their deadline, of all heads."""
        with self._lock:
            return self._books.open_holds(self._clock_ms())

    def key_spent_microcredits(self, member: bytes, key_id: bytes) -> int:
        """What the member's API key has paid so far, at all gateways."""
        with self._lock:
            return self._books.key_spent_microcredits(member, key_id)

    def num_key_sessions_since(self, member: bytes, key_id: bytes, since_ms: int) -> int:
        with self._lock:
            return self._books.num_key_sessions_since(member, key_id, since_ms)

    def key_use(self, member: bytes, key_id: bytes, since_ms: int, known_from_ms: int = 0) -> KeyUse:
        """What the key has paid and holds at all gateways, and its sessions since then.

        Not those that this node began or settled from `known_from_ms` on.
        """
        with self._lock:
            now_ms = self._clock_ms()
            return self._books.key_use(member, key_id, now_ms, since_ms, self._author, known_from_ms)

    def counts(self, receipt: Receipt) -> bool:
        """Whether this receipt is the one that counts for its stage."""
        with self._lock:
            return self._books.counts(receipt)

    def is_paid(self, receipt: Receipt) -> bool:
        """Whether this receipt counts, or a higher one of its stage: then there is nothing to claim."""
        with self._lock:
            return self._books.is_paid(receipt)

    def covers(self, receipt: Receipt) -> bool:
        """Whether its head holds as much of the payer's credit as this receipt alone asks for."""
        with self._lock:
            holds = self._books.holds_of(receipt.head, receipt.session)
        payer = (receipt.payer, receipt.key_id)
        return any(
            (hold.payer, hold.key_id) == payer and hold.amount_microcredits >= receipt.amount_microcredits
            for hold in holds
        )

    def member_totals(self) -> dict[bytes, MemberTotals]:
        with self._lock:
            return self._books.member_totals()

    def treasury(self) -> TreasuryTotals:
        with self._lock:
            return self._books.treasury()

    def dividend_periods(self) -> list[Period]:
        """The periods that have something to divide, newest first."""
        with self._lock:
            return self._books.dividend_periods()

    def transferable_microcredits(self, member: bytes) -> int:
        """How much more of this member's credit transfers can move, whatever its balance is."""
        with self._lock:
            return self._books.transferable_microcredits(member)

    def recent_sessions(self, limit: int) -> list[SessionSummary]:
        with self._lock:
            return self._books.recent_sessions(limit, self._clock_ms())

    def session(self, head: bytes, session: bytes) -> SessionSummary | None:
        with self._lock:
            return self._books.session(head, session, self._clock_ms())

    def verify(self) -> list[Violation]:
        """Audit the stored entries from their raw bytes; empty when all is right. About 1 ms per entry."""
        # Without the lock: the journal only grows, and requests must not wait for an audit.
        return verify_journal(self._journal, self._pod, self._directory)
