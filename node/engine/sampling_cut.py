"""Which tokens of a row may be picked, likeliest first, and the one at a random number.

A token's weight is its probability relative to the likeliest token's, as an integer of 40 binary places.
Integers add up to the same sum in any order, so what is computed over a few candidates is exactly what the
whole sorted vocabulary would give. Only candidates are ever sorted: a bound that no kept token can fall
below is found without sorting. Whole rows are worked on in memory that is kept from row to row: fresh memory
of that size comes from the kernel page by page, which took longer than the arithmetic. Knows one row and its
settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from node.links.frames import Sampling

Scores = NDArray[np.float32]
Weights = NDArray[np.int64]
Ids = NDArray[np.int64]

NUM_WEIGHT_BITS = 40
_ONE = 1 << NUM_WEIGHT_BITS
_BLOCK_TOKENS = 64
_SIGN = np.uint32(1 << 31)


@dataclass(frozen=True, slots=True)
class Scratch:
    """Working memory for one row. `row_V` is the caller's to fill; the others last until the next call."""

    row_V: Scores
    scaled_V: Scores
    weights_V: Weights
    mask_V: NDArray[np.bool_]

    @classmethod
    def of(cls, vocab_size: int) -> Self:
        floats = np.empty((2, vocab_size), np.float32)
        return cls(floats[0], floats[1], np.empty(vocab_size, np.int64), np.empty(vocab_size, np.bool_))


def weights(scores: Scores, top: float, temperature: float, scratch: Scratch) -> Weights:
    """`exp((score - top) / temperature)`, times 2^40, rounded down; `top` is the highest score."""
    scaled, result = scratch.scaled_V[: len(scores)], scratch.weights_V[: len(scores)]
    with np.errstate(over="ignore", under="ignore"):
        np.subtract(scores, np.float32(top), out=scaled)
        np.multiply(scaled, np.float32(1 / temperature), out=scaled)
        np.exp(scaled, out=scaled)
    np.multiply(scaled, np.float32(_ONE), out=scaled)
    np.copyto(result, scaled, casting="unsafe")
    return result


def draw_token(
    scores_V: Scores, top: float, sampling: Sampling, random_bits: int, num_bits: int, scratch: Scratch
) -> int:
    """The token at `random_bits / 2^num_bits` of the kept mass, counted from the likeliest on.

    Top-k and min-p cut first; top-p keeps, of what is left, the fewest tokens that reach it.
    """
    if 0 < sampling.top_k < len(scores_V):
        ids, weights_C, total = _cut_by_rank(scores_V, top, sampling, scratch)
    else:
        ids, weights_C, total = _cut_by_weight(scores_V, top, sampling, random_bits, num_bits, scratch)
    mass_C = weights_C.cumsum()
    if sampling.top_p < 1:
        total = int(mass_C[mass_C.searchsorted(_share(sampling.top_p, total))])
    target = (random_bits * total) >> num_bits
    return int(ids[mass_C.searchsorted(target, side="right")])


def likeliest(scores_V: Scores, num: int, scratch: Scratch) -> Ids:
    """Ids of the `num` highest scores, highest first; of equal scores the lowest id first."""
    bound = _bound_of_rank(scores_V, num, scratch)
    candidates = np.flatnonzero(np.greater_equal(scores_V, bound, out=scratch.mask_V))
    return candidates[_descending(scores_V[candidates])][:num]


def _cut_by_rank(
    scores_V: Scores, top: float, sampling: Sampling, scratch: Scratch
) -> tuple[Ids, Weights, int]:
    """All that top-k and min-p keep, and its mass."""
    ids = likeliest(scores_V, sampling.top_k, scratch)
    weights_C = weights(scores_V[ids], top, sampling.temperature, scratch)
    weights_C = weights_C[weights_C >= _share(sampling.min_p, _ONE)]
    return ids, weights_C, int(weights_C.sum())


def _cut_by_weight(
    scores_V: Scores, top: float, sampling: Sampling, random_bits: int, num_bits: int, scratch: Scratch
) -> tuple[Ids, Weights, int]:
    """The mass of all that min-p keeps, and those of it that the draw can come to."""
    weights_V = weights(scores_V, top, sampling.temperature, scratch)
    least = _share(sampling.min_p, _ONE)
    if least:
        total = int(weights_V[np.greater_equal(weights_V, least, out=scratch.mask_V)].sum())
    else:
        total = int(weights_V.sum())
    needed = _share(sampling.top_p, total) if sampling.top_p < 1 else ((random_bits * total) >> num_bits) + 1
    # All tokens lighter than this weigh less together than what is not needed.
    least = max(least, (total - needed) // len(scores_V) + 1)
    ids = np.flatnonzero(np.greater_equal(weights_V, least, out=scratch.mask_V))
    ids = ids[_descending(scores_V[ids])]
    return ids, weights_V[ids], total


def _share(part: float, whole: int) -> int:
    """`part * whole`, rounded up, without floating point."""
    numerator, denominator = part.as_integer_ratio()
    return -(-numerator * whole // denominator)


def _bound_of_rank(scores_V: Scores, num: int, scratch: Scratch) -> np.float32:
    """At most the `num`-th highest score: exactly it, or of few, that of the highest per block."""
    num_blocks = len(scores_V) // _BLOCK_TOKENS
    if 4 * num > num_blocks:
        tops = scratch.scaled_V
        np.copyto(tops, scores_V)
    else:
        tops = scores_V[: num_blocks * _BLOCK_TOKENS].reshape(_BLOCK_TOKENS, num_blocks).max(axis=0)
    tops.partition(len(tops) - num)
    return np.float32(tops[len(tops) - num])


def _descending(scores: Scores) -> Ids:
    """The order that sorts them, highest first, equals as they stand. One sort of integers that hold both."""
    bits = (scores + np.float32(0)).view(np.uint32)
    falling = np.where(bits & _SIGN, bits, ~bits & ~_SIGN).astype(np.uint64)
    keys = (falling << np.uint64(32)) | np.arange(len(scores), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
