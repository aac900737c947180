"""Measures a loaded shard: one layer's time for a few step sizes, with real block tables, and the head's.

Whatever the shard, it takes hardly longer than its budget: fewer layers and repeats where a pass is slow, and
a size that does not fit any more is reckoned from the last one, in proportion. Knows nothing of where its
numbers go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from node.engine.attention import PagedStep, Span
from node.engine.kv_cache import BLOCK_TOKENS, BlockTable, KvCache
from node.engine.runner import Runner
from node.speed import DECODE_ROWS, MAX_US, NO_HEAD, PREFILL_ROWS, Speed

BUDGET_S = 1.5
_NUM_REPEATS = 5
# Layers of one pass: as many as one row takes about this long for.
_PASS_S = 0.03

Clock = Callable[[], float]


class _Timer:
    """Shares the budget out over the sizes that are still to be measured."""

    def __init__(self, clock_s: Clock, budget_s: float, num_sizes: int) -> None:
        self._clock_s = clock_s
        self._until_s = clock_s() + budget_s
        self._num_left = num_sizes

    def once_s(self, run: Callable[[], None]) -> float:
        started_s = self._clock_s()
        run()
        return self._clock_s() - started_s

    def least_s(self, run: Callable[[], None], expected_s: float) -> float:
        """What else the machine does only adds to a time. `expected_s` when there is none to measure in."""
        share_s = max(0.0, self._until_s - self._clock_s()) / max(1, self._num_left)
        self._num_left -= 1
        if expected_s > share_s:
            return expected_s
        times_s = [self.once_s(run)]
        while len(times_s) <= _NUM_REPEATS and sum(times_s) + times_s[-1] < share_s:
            times_s.append(self.once_s(run))
        return min(times_s)


class _Passes:
    """Steps through the first `num_layers` layers: made-up hidden states, tables of the real cache."""

    def __init__(self, runner: Runner, cache: KvCache, hidden_size: int) -> None:
        self._runner = runner
        self._cache = cache
        rows_TD = torch.randn(max(PREFILL_ROWS), hidden_size, generator=torch.Generator().manual_seed(0))
        self._rows_TD = rows_TD.to(runner.device, runner.dtype)
        self.num_layers = 1

    def decode(self, num_rows: int) -> None:
        """One row per session, each the last of its first block."""
        tables = [self._cache.open(1) for _ in range(num_rows)]
        self._run(tables, [Span(table, BLOCK_TOKENS - 1, 1) for table in tables])

    def prefill(self, num_rows: int) -> None:
        table = self._cache.open(num_rows)
        self._run([table], [Span(table, 0, num_rows, num_rows)])

    def head(self, num_rows: int) -> None:
        _finish(self._runner.logits(self._rows_TD[:num_rows].clone()))

    def fits(self, num_tokens: int) -> bool:
        return self._cache.can_open(num_tokens)

    def clear(self) -> None:
        """No pass may meet what lay in the cache's memory before: it need not be numbers."""
        table = self._cache.open(
            min(self._cache.num_tokens, max(*PREFILL_ROWS, DECODE_ROWS[-1] * BLOCK_TOKENS))
        )
        slots = table.slots(0, table.num_tokens)
        for layer in range(self._runner.start_layer, self._runner.start_layer + self.num_layers):
            for cache_KSD in self._cache.layer(layer):
                cache_KSD.index_fill_(1, slots, 0)
        self._cache.close(table)

    def _run(self, tables: Sequence[BlockTable], spans: list[Span]) -> None:
        runner, start = self._runner, self._runner.start_layer
        positions = [position for s in spans for position in range(s.position, s.position + s.num_tokens)]
        rows_TD = self._rows_TD[: len(positions)].clone()
        step = PagedStep(self._cache, spans)
        positions_T = torch.tensor(positions, device=runner.device)
        _finish(runner.run(rows_TD, positions_T, step, start, start + self.num_layers))
        # Backwards, so that the next pass, and the first session, get the lowest blocks again.
        for table in reversed(tables):
            self._cache.close(table)


@torch.inference_mode()
def measure(
    runner: Runner,
    cache: KvCache,
    hidden_size: int,
    has_head: bool,
    clock_s: Clock = time.perf_counter,
    budget_s: float = BUDGET_S,
) -> Speed:
    """`cache` is still without sessions, and is so again afterwards."""
    passes = _Passes(runner, cache, hidden_size)
    num_sizes = len(DECODE_ROWS) * (1 + has_head) + len(PREFILL_ROWS)
    timer = _Timer(clock_s, budget_s, num_sizes)
    passes.clear()
    # The first pass also starts threads and fills caches: the second is to be believed.
    warm_s = min(timer.once_s(lambda: passes.decode(1)) for _ in range(2))
    num_layers = runner.end_layer - runner.start_layer
    passes.num_layers = max(1, min(num_layers, int(_PASS_S / max(warm_s, 1e-9))))
    passes.clear()
    fits = passes.fits
    known = 1, warm_s * passes.num_layers
    decode_s = _times_s(timer, passes.decode, DECODE_ROWS, lambda rows: fits(rows * BLOCK_TOKENS), known)
    prefill_s = _times_s(timer, passes.prefill, PREFILL_ROWS, fits, (DECODE_ROWS[-1], decode_s[-1]))
    head_s = _times_s(timer, passes.head, DECODE_ROWS, lambda _: True) if has_head else []
    return Speed(
        _whole_us(decode_s, passes.num_layers),
        _whole_us(prefill_s, passes.num_layers),
        _whole_us(head_s, 1) or NO_HEAD,
    )


def _times_s(
    timer: _Timer,
    run: Callable[[int], None],
    sizes: Sequence[int],
    fits: Callable[[int], bool],
    known: tuple[int, float] = (1, 0.0),
) -> list[float]:
    """For each size. `known`: a size no larger, and its time."""
    times_s: list[float] = []
    for size in sizes:
        expected_s = known[1] * size / known[0]
        time_s = timer.least_s(partial(run, size), expected_s) if fits(size) else expected_s
        times_s.append(time_s)
        known = size, time_s
    return times_s


def _whole_us(times_s: Sequence[float], num_layers: int) -> tuple[int, ...]:
    return tuple(max(1, min(MAX_US, round(time_s / num_layers * 1e6))) for time_s in times_s)


def _finish(result: Tensor) -> None:
    """Wait until the device is done."""
    result[0, 0].item()
