"""What two replicas tell each other to end equal: version vectors, and the entries that answer one.

Pure functions over a journal; no network, no time. Delivery may lose, double and reorder: whatever did not
arrive is missing again in the next round. A head names every branch of an author, so forks travel too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256

from ledger import canonical
from ledger.chains import MAX_NUM_BRANCHES, Chain, Tip
from ledger.entry import HASH_BYTES, MAX_ENTRY_BYTES
from ledger.journal import Journal, Record
from ledger.receipt import NODE_ID_BYTES

Heads = Mapping[bytes, tuple[Tip, ...]]

_FORMAT = 1
_INDEX_BYTES = 8
_POINT_BYTES = NODE_ID_BYTES + _INDEX_BYTES + HASH_BYTES
_MAX_NUM_POINTS = 10_000
MAX_HEADS_BYTES = _MAX_NUM_POINTS * (_POINT_BYTES + 2) + 16
MAX_NUM_ENTRIES_PER_BATCH = 4_096
_MAX_BATCH_BYTES = 4 * 1024 * 1024
# More than the branches of one author, so that a page always gets beyond its first index.
_READ_AHEAD = 64


class SyncError(ValueError):
    """A peer's bytes are no heads or no batch of entries."""


def encode_heads(heads: Heads) -> bytes:
    points = [
        author + tip.index.to_bytes(_INDEX_BYTES, "big") + tip.hash
        for author, tips in heads.items()
        for tip in tips
    ]
    return canonical.encode((_FORMAT, list[canonical.Value](sorted(points))))


def decode_heads(raw: bytes) -> dict[bytes, tuple[Tip, ...]]:
    """Raise SyncError unless `raw` is an encoding of heads."""
    heads: dict[bytes, tuple[Tip, ...]] = {}
    for point in _decode_list(raw, MAX_HEADS_BYTES, _MAX_NUM_POINTS, _POINT_BYTES):
        if len(point) != _POINT_BYTES:
            raise SyncError("a head has a wrong size")
        author, rest = point[:NODE_ID_BYTES], point[NODE_ID_BYTES:]
        tip = Tip(int.from_bytes(rest[:_INDEX_BYTES], "big"), rest[_INDEX_BYTES:])
        heads[author] = (*heads.get(author, ()), tip)
        if tip.index > canonical.MAX_UINT or len(heads[author]) > MAX_NUM_BRANCHES:
            raise SyncError("a head is out of bounds")
    return heads


def encode_batch(raws: Sequence[bytes]) -> bytes:
    return canonical.encode((_FORMAT, list[canonical.Value](raws)))


def decode_batch(raw: bytes) -> tuple[bytes, ...]:
    """Raise SyncError unless `raw` is an encoding of a batch; the entries in it are not looked at."""
    return _decode_list(raw, _MAX_BATCH_BYTES, MAX_NUM_ENTRIES_PER_BATCH, MAX_ENTRY_BYTES)


def _decode_list(
    raw: bytes, max_num_bytes: int, max_num_items: int, max_item_bytes: int
) -> tuple[bytes, ...]:
    try:
        reader = canonical.decode(raw, max_num_bytes)
        reader.expect_num_fields(2)
        reader.uint(0, _FORMAT)
        return reader.raws(1, max_num_items, max_item_bytes)
    except canonical.CanonicalError as error:
        raise SyncError(str(error)) from error


def digest(heads: Heads) -> bytes:
    """Equal if and only if two replicas hold the same entries."""
    return sha256(encode_heads(heads)).digest()


def missing(
    journal: Journal, chains: Mapping[bytes, Chain], theirs: Heads, max_bytes: int
) -> tuple[list[bytes], bool]:
    """Raw entries that a replica with heads `theirs` lacks, parents first, and whether there are more.

    At least one entry is returned when one is missing, however small `max_bytes` is. Authors take turns and
    those that forked come last, so that entries the reader refuses never keep the others' back.
    """
    unforked = [_missing_of(journal, chains[a], theirs.get(a, ())) for a in _authors(chains, False)]
    forked = [_missing_of(journal, chains[a], theirs.get(a, ())) for a in _authors(chains, True)]
    batch: list[bytes] = []
    num_bytes = 0
    for record in itertools.chain(_in_turns(unforked), _in_turns(forked)):
        num_bytes += len(record.raw)
        if batch and (num_bytes > max_bytes or len(batch) == MAX_NUM_ENTRIES_PER_BATCH):
            return batch, True
        batch.append(record.raw)
    return batch, False


def _authors(chains: Mapping[bytes, Chain], is_forked: bool) -> list[bytes]:
    return sorted(author for author, chain in chains.items() if chain.is_forked is is_forked)


def _in_turns(sources: list[Iterator[Record]]) -> Iterator[Record]:
    """One record of each source after the other."""
    while sources:
        remaining = []
        for source in sources:
            record = next(source, None)
            if record is not None:
                remaining.append(source)
                yield record
        sources = remaining


def _missing_of(journal: Journal, chain: Chain, theirs: tuple[Tip, ...]) -> Iterator[Record]:
    if set(theirs) == set(chain.sorted_tips()):
        return
    known = [tip for tip in theirs if tip.hash in journal.hashes_at(chain.author, tip.index)]
    if len(theirs) >= MAX_NUM_BRANCHES:
        # They hold proof enough and take no further branch: only what follows their own is of use.
        yield from _descendants(journal, chain, known)
        return
    start = _start_index(chain, theirs, known)
    if start is None:
        return
    held = _ancestry(journal, chain, known, start) if chain.is_forked else frozenset()
    for record in _read_from(journal, chain.author, start):
        if record.hash not in held:
            yield record


def _descendants(journal: Journal, chain: Chain, known: Sequence[Tip]) -> Iterator[Record]:
    if not known:
        return
    reached = {tip.hash for tip in known}
    for record in _read_from(journal, chain.author, min(tip.index for tip in known) + 1):
        if record.prev_hash in reached:
            reached.add(record.hash)
            yield record


def _start_index(chain: Chain, theirs: tuple[Tip, ...], known: Sequence[Tip]) -> int | None:
    if not theirs:
        return 0
    if known:
        start = max(tip.index for tip in known) + 1
        return min(start, *chain.branch_indexes) if chain.is_forked else start
    # They stand on a branch we lack. If it is not ahead of us, ours beside it is the proof of the fork.
    lowest = min(tip.index for tip in theirs)
    last = chain.last
    return lowest if last is not None and lowest <= last.index else None


def _ancestry(journal: Journal, chain: Chain, known: Sequence[Tip], start: int) -> frozenset[bytes]:
    """Hashes from `start` on that whoever holds the `known` entries holds too."""
    held = {tip.hash for tip in known}
    for record in reversed(list(_read_from(journal, chain.author, start))):
        if record.hash in held:
            held.add(record.prev_hash)
    return frozenset(held)


def _read_from(journal: Journal, author: bytes, start: int) -> Iterator[Record]:
    """All records from an index on, by index; an index is never cut in two by the paging."""
    while True:
        records = journal.read_range(author, start, _READ_AHEAD)
        is_last_page = len(records) < _READ_AHEAD
        if not is_last_page:
            records = [record for record in records if record.index < records[-1].index]
        yield from records
        if is_last_page:
            return
        start = records[-1].index + 1
