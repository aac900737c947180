"""How fast layers run on a node: microseconds of one layer, and of the head, by the rows of a step.

A value that travels in adverts, so it is checked wherever it is made. Pure integers: every machine works out
the same times from it. It knows neither how it was measured nor what is decided on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

DECODE_ROWS = (1, 4, 16)
"""Rows of a decode step (one per session), and of the head, that are measured."""

PREFILL_ROWS = (64, 256)
"""Tokens of a prompt's chunk that are measured."""

MAX_US = 60_000_000
NO_HEAD = (0,) * len(DECODE_ROWS)


@dataclass(frozen=True, slots=True)
class Speed:
    """Microseconds of one layer for a step of `DECODE_ROWS` and of `PREFILL_ROWS`; of final norm and head.

    `head_us` is all zeros where the head is not. Raises ValueError for a time that nothing can take.
    """

    decode_us: tuple[int, ...]
    prefill_us: tuple[int, ...]
    head_us: tuple[int, ...] = NO_HEAD

    def __post_init__(self) -> None:
        _check(self.decode_us, DECODE_ROWS)
        _check(self.prefill_us, PREFILL_ROWS)
        if self.head_us != NO_HEAD:
            _check(self.head_us, DECODE_ROWS)

    @property
    def has_head(self) -> bool:
        return self.head_us != NO_HEAD

    def layer_ns(self, num_rows: int) -> int:
        """One layer in a step of so many decodes."""
        return _between(DECODE_ROWS, self.decode_us, num_rows)

    def head_ns(self, num_rows: int) -> int:
        return _between(DECODE_ROWS, self.head_us, num_rows)

    @property
    def prefill_ns_per_token(self) -> int:
        """One layer, in the chunk size that is fastest per token."""
        return max(1, min(1000 * us // rows for us, rows in zip(self.prefill_us, PREFILL_ROWS, strict=True)))

    def or_head_of(self, earlier: Speed | None) -> Speed:
        """With the head's times of an earlier measurement, if this one did not have the head."""
        if self.has_head or earlier is None:
            return self
        return Speed(self.decode_us, self.prefill_us, earlier.head_us)


def _check(times_us: tuple[int, ...], sizes: Sequence[int]) -> None:
    if len(times_us) != len(sizes) or not all(0 < us <= MAX_US for us in times_us):
        raise ValueError("a speed of impossible times")


def _between(sizes: Sequence[int], times_us: Sequence[int], size: int) -> int:
    """Nanoseconds: on the straight line between the measured sizes around `size`, at least the smallest's."""
    points = list(zip(sizes, times_us, strict=True))
    pairs = list(pairwise(points))
    (low, low_us), (high, high_us) = next((pair for pair in pairs if size <= pair[1][0]), pairs[-1])
    ns = 1000 * low_us + 1000 * (high_us - low_us) * (size - low) // (high - low)
    return max(ns, 1000 * min(times_us))
