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
        self._hold_payers: dict[tuple[bytes, bytes], set[bytes]] = {}
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
        for entry in sorted(entries.values(), key=lambda entry: (entry.author, entry.index, entry.hash)):
            self._offer(entry)

    def _offer(self, entry: Entry) -> None:
        chain = self.chains.get(entry.author) or self._old_chains.get(entry.author) or Chain(entry.author)
        place = chain.place(entry.index, entry.hash, entry.prev_hash, self._hashes_at)
        try:
            match place:
                case Place.KNOWN:
                    return
                case Place.TOO_MANY_BRANCHES:
                    raise EntryRefused("its author forked too often")
                case Place.GAP:
                    self._note_divergence(entry, chain)
                    raise EntryRefused("the entry before it is not here")
                case Place.NEXT | Place.BRANCH:
                    check_entry(entry, self._pod, self._directory, self._payers)
        except EntryRefused as refusal:
            self.refused.append(Refusal(entry.author, entry.index, str(refusal)))
            return
        self._accept(entry, place)

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
            self._hold_payers.setdefault((entry.author, entry.body.session), set()).add(entry.body.payer)
        self.accepted.append(entry)

    def _note_divergence(self, entry: Entry, chain: Chain) -> None:
        """We stand on another branch than whoever sent this: look twice as far back in the next round."""
        last = chain.last
        if last is not None and entry.index <= last.index + 1 and entry.is_signed_by_author():
            self.rewinds[entry.author] = max(1, 2 * self._old_rewinds.get(entry.author, 0))

    def _hashes_at(self, author: bytes, index: int) -> set[bytes]:
        return self._hashes.get((author, index), set()) | set(self._journal.hashes_at(author, index))

    def _payers(self, author: bytes, session: bytes) -> set[bytes]:
        stored = self._books.hold_payers(author, session)
        return self._hold_payers.get((author, session), set()) | set(stored)
