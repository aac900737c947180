"""Where each author's journal ends, and whether it forked.

A journal is a tree that honest authors keep a straight line. Entries of every branch are kept and count: a
signature binds its signer on both sides of a fork, so a fork can take nothing back, and replicas that saw
different branches first still end equal. The author is frozen: it writes no more, and nobody should serve it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum

from ledger.entry import FIRST_PREV_HASH

# One author can make others store at most this many branches.
MAX_NUM_BRANCHES = 16

HashesAt = Callable[[bytes, int], Collection[bytes]]


class Place(Enum):
    """How an entry fits what is known of its author's journal."""

    NEXT = "next"
    BRANCH = "branch"
    KNOWN = "known"
    GAP = "gap"
    TOO_MANY_BRANCHES = "too many branches"


@dataclass(frozen=True, slots=True, order=True)
class Tip:
    """The last entry of a branch."""

    index: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class Fork:
    """Entries of one author at one index: portable proof that it signed two histories."""

    author: bytes
    index: int
    hashes: tuple[bytes, ...]


@dataclass(slots=True)
class Chain:
    """One author's journal. `hashes_at` asks what is stored; `branch_indexes` are where branches begin."""

    author: bytes
    tips: dict[bytes, int] = field(default_factory=dict)
    branch_indexes: set[int] = field(default_factory=set)

    @property
    def is_forked(self) -> bool:
        return bool(self.branch_indexes)

    @property
    def last(self) -> Tip | None:
        """The end of the longest branch."""
        return max(self.sorted_tips(), default=None)

    def sorted_tips(self) -> tuple[Tip, ...]:
        return tuple(sorted(Tip(index, hash_) for hash_, index in self.tips.items()))

    def place(self, index: int, hash_: bytes, prev_hash: bytes, hashes_at: HashesAt) -> Place:
        if not self.tips:
            return Place.NEXT if index == 0 and prev_hash == FIRST_PREV_HASH else Place.GAP
        if self.tips.get(prev_hash) == index - 1:
            return Place.NEXT
        if hash_ in hashes_at(self.author, index):
            return Place.KNOWN
        has_parent = (
            prev_hash in hashes_at(self.author, index - 1) if index > 0 else prev_hash == FIRST_PREV_HASH
        )
        if not has_parent:
            return Place.GAP
        return Place.BRANCH if len(self.tips) < MAX_NUM_BRANCHES else Place.TOO_MANY_BRANCHES

    def extend(self, index: int, hash_: bytes, prev_hash: bytes) -> None:
        """Take in an entry whose place is NEXT or BRANCH."""
        if self.tips and self.tips.pop(prev_hash, None) is None:
            self.branch_indexes.add(index)
        self.tips[hash_] = index

    def copy(self) -> Chain:
        return Chain(self.author, dict(self.tips), set(self.branch_indexes))
