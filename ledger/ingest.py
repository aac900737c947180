"""Deciding about a batch of others' entries: a draft of what would change, made before anything is written.

It reads the journal and the books and changes neither; `Ledger.ingest` commits the accepted entries at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ledger.books import Books
from ledger.chains import Chain, Fork, Place
from ledger.directory import Directory
from ledger.entry import Entry, EntryError, HoldOpened, decode_entry
from ledger.journal import Journal
from ledger.rules import EntryRefused, check_entry
from ledger.session_record import Hold

# A claim may come before the hold it needs, whose author may have waited for another claim, and so on.
MAX_NUM_PASSES = 8


@dataclass(frozen=True, slots=True)
class Refusal:
    """An entry that was not taken in; `author` is empty when the bytes are no entry.

    It may be right once more is known, and then it is offered again.
    """

    author: bytes
    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class IngestResult:
    """`forks` are those that this batch revealed."""

    num_new: int
    refused: tuple[Refusal, ...]
    forks: tuple[Fork, ...]


class Draft:
    """The outcome of a batch. `rewinds` is how far below its last entry to advertise an author's head."""

    def __init__(
        self,
        pod: bytes,
        directory: Directory,
        journal: Journal,
        books: Books,
        chains: Mapping[bytes, Chain],
        rewinds: Mapping[bytes, int],
    ) -> None:
        self._pod = pod
        self._directory = directory
        self._journal = journal
        self._books = books
        self._old_chains = chains
        self._old_rewinds = rewinds
        self._hashes: dict[tuple[bytes, int], set[bytes]] = {}
        self._holds: dict[tuple[bytes, bytes], list[Hold]] = {}
        self.accepted: list[Entry] = []
        self.refused: list[Refusal] = []
        self.forked: set[tuple[bytes, int]] = set()
        self.chains: dict[bytes, Chain] = {}
        self.rewinds: dict[bytes, int] = {}

    def offer_all(self, raws: Iterable[bytes]) -> None:
        entries: dict[bytes, Entry] = {}
        for raw in raws:
            try:
                entry = decode_entry(raw)
            except EntryError as error:
                self.refused.append(Refusal(b"", 0, str(error)))
            else:
                entries[entry.hash] = entry
        # By index, so that a batch that arrives shuffled needs no second round.
        pending = sorted(entries.values(), key=lambda entry: (entry.author, entry.index, entry.hash))
        refusals: list[Refusal] = []
        for _ in range(MAX_NUM_PASSES):
            offers = [(entry, self._offer(entry)) for entry in pending]
            refusals = [refusal for _, refusal in offers if refusal is not None]
            still_pending = [entry for entry, refusal in offers if refusal is not None]
            if not still_pending or len(still_pending) == len(pending):
                break
            pending = still_pending
        self.refused += refusals

    def _offer(self, entry: Entry) -> Refusal | None:
        chain = self.chains.get(entry.author) or self._old_chains.get(entry.author) or Chain(entry.author)
        place = chain.place(entry.index, entry.hash, entry.prev_hash, self._hashes_at)
        try:
            match place:
                case Place.KNOWN:
                    return None
                case Place.TOO_MANY_BRANCHES:
                    raise EntryRefused("its author forked too often")
                case Place.GAP:
                    self._note_divergence(entry, chain)
                    raise EntryRefused("the entry before it is not here")
                case Place.NEXT | Place.BRANCH:
                    check_entry(entry, self._pod, self._directory, self._holds_of)
        except EntryRefused as refusal:
            return Refusal(entry.author, entry.index, str(refusal))
        self._accept(entry, place)
        return None

    def _accept(self, entry: Entry, place: Place) -> None:
        if entry.author not in self.chains:
            old = self._old_chains.get(entry.author)
            self.chains[entry.author] = old.copy() if old is not None else Chain(entry.author)
        self.chains[entry.author].extend(entry.index, entry.hash, entry.prev_hash)
        if place is Place.BRANCH:
            self.forked.add((entry.author, entry.index))
            self.rewinds[entry.author] = 0
        self._hashes.setdefault((entry.author, entry.index), set()).add(entry.hash)
        if isinstance(entry.body, HoldOpened):
            hold = Hold.of(entry.author, entry.body, entry.time_ms)
            self._holds.setdefault((entry.author, entry.body.session), []).append(hold)
        self.accepted.append(entry)

    def _note_divergence(self, entry: Entry, chain: Chain) -> None:
        """We stand on another branch than whoever sent this: look twice as far back in the next round."""
        last = chain.last
        if last is not None and entry.index <= last.index + 1 and entry.is_signed_by_author():
            self.rewinds[entry.author] = max(1, 2 * self._old_rewinds.get(entry.author, 0))

    def _hashes_at(self, author: bytes, index: int) -> set[bytes]:
        return self._hashes.get((author, index), set()) | set(self._journal.hashes_at(author, index))

    def _holds_of(self, author: bytes, session: bytes) -> list[Hold]:
        return [*self._holds.get((author, session), ()), *self._books.holds_of(author, session)]
