"""Whose turn it is when an engine has no room for all: who asked lately, and what is kept for whom.

Room is a place among the sessions of the engine and KV blocks of one cache. What a member asked for and was
refused is kept for it before others with a higher counter get any, as long as it goes on asking. Room that
is there and yet not taken (its head waits for another stage) is kept for `PATIENCE_MS` only. Pure: the caller
says the time and what is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

# A head asks again within a quarter of a second.
LATELY_MS = 600
PATIENCE_MS = 150
MAX_NUM_ASKS = 4096


class Claim(IntEnum):
    """Why somebody goes before others, whatever the counters say; the lowest first."""

    PREEMPTED = 0
    OWN_MACHINE = 1
    SHARE = 2
    PAST_CREDIT_LINE = 3


@dataclass(frozen=True, slots=True)
class Asker:
    """`cache` names the cache that blocks are wanted of. `is_replay` only orders a member's own requests."""

    member: bytes
    claim: Claim
    is_replay: bool
    cache: int


@dataclass(slots=True)
class Ask:
    num_blocks: int
    until_ms: int
    fits_since_ms: int | None = None


Rank = tuple[int, int, bool]


class Turns:
    def __init__(self, count_of: Callable[[bytes], int]) -> None:
        """`count_of(member)`: its virtual token counter."""
        self._count_of = count_of
        self._asks: dict[Asker, Ask] = {}

    def rank(self, asker: Asker) -> Rank:
        """The lowest is next."""
        return asker.claim, self._count_of(asker.member), not asker.is_replay

    def asks(self, asker: Asker, num_blocks: int, now_ms: int) -> None:
        """It was refused."""
        known = self._asks.get(asker)
        if known is not None:
            known.num_blocks, known.until_ms = num_blocks, now_ms + LATELY_MS
        elif len(self._asks) < MAX_NUM_ASKS:
            self._asks[asker] = Ask(num_blocks, now_ms + LATELY_MS)

    def no_room(self) -> None:
        """There is not a single place."""
        for ask in self._asks.values():
            ask.fits_since_ms = None

    def given(self, asker: Asker) -> None:
        """What it asked for."""
        self._asks.pop(asker, None)

    def members(self, now_ms: int) -> set[bytes]:
        """Who asked lately."""
        self._forget(now_ms)
        return {asker.member for asker in self._asks}

    def kept_before(
        self, asker: Asker, num_free_slots: int, num_free_blocks: Callable[[int], int], now_ms: int
    ) -> tuple[int, int]:
        """Slots, and blocks of the asker's cache, that are kept for who comes before it."""
        self._forget(now_ms)
        num_slots = num_blocks = 0
        for other, ask in self._before(asker):
            is_same_cache = other.cache == asker.cache
            num_before = num_blocks if is_same_cache else 0
            has_blocks = num_before + ask.num_blocks <= num_free_blocks(other.cache)
            if not has_blocks or num_slots >= num_free_slots:
                ask.fits_since_ms = None
            elif ask.fits_since_ms is None:
                ask.fits_since_ms = now_ms
            elif now_ms - ask.fits_since_ms > PATIENCE_MS:
                continue
            if is_same_cache:
                num_blocks += ask.num_blocks
            # A place is of no use to who lacks the blocks of another cache.
            num_slots += is_same_cache or has_blocks
        return num_slots, num_blocks

    def _before(self, asker: Asker) -> Iterator[tuple[Asker, Ask]]:
        """In order. A member's own requests of the same kind do not stand in each other's way."""
        own = self.rank(asker)
        ranked = sorted(
            ((self.rank(other), other) for other in self._asks if other != asker),
            key=lambda pair: (pair[0], pair[1].member),
        )
        for rank, other in ranked:
            if rank >= own:
                return
            yield other, self._asks[other]

    def _forget(self, now_ms: int) -> None:
        for asker in [asker for asker, ask in self._asks.items() if ask.until_ms <= now_ms]:
            del self._asks[asker]
