"""A shard's own measurement: right about a runner whose cost is known, short whatever the runner, tidy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from node.engine.attention import PagedStep
from node.engine.kv_cache import BLOCK_TOKENS, KvCache
from node.engine.probe import BUDGET_S, measure
from node.engine.runner import Runner
from node.speed import DECODE_ROWS, PREFILL_ROWS, Speed
from tests.engine.ring import load
from tests.engine.tiny import TinyModel

NUM_LAYERS = 8


@dataclass
class FakeRunner:
    """A layer takes `base_s + row_s` per row, the head ten times that; the first pass is slow."""

    base_s: float
    row_s: float
    start_layer: int = 4
    end_layer: int = 4 + NUM_LAYERS
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    now_s: float = 0.0
    num_layers_run: list[int] = field(default_factory=list)
    spans: set[tuple[int, int]] = field(default_factory=set)

    def clock_s(self) -> float:
        return self.now_s

    def run(self, hidden_TD: Tensor, positions_T: Tensor, step: PagedStep, start: int, end: int) -> Tensor:
        assert start == self.start_layer
        assert len(hidden_TD) == len(positions_T) == sum(span.num_tokens for span in step.spans)
        assert len({block for s in step.spans for block in s.table.blocks}) == sum(
            len(span.table.blocks) for span in step.spans
        )
        self.spans.add((len(step.spans), step.spans[0].num_tokens))
        self.now_s += (1.0 if not self.num_layers_run else 0.0) + (end - start) * self.cost_s(len(hidden_TD))
        self.num_layers_run.append(end - start)
        return hidden_TD

    def logits(self, hidden_BD: Tensor) -> Tensor:
        self.now_s += 10 * self.cost_s(len(hidden_BD))
        return hidden_BD

    def cost_s(self, num_rows: int) -> float:
        return self.base_s + self.row_s * num_rows


def make_cache(num_blocks: int = 64) -> KvCache:
    return KvCache(4, 4 + NUM_LAYERS, num_blocks, 1, 2, torch.float32, torch.device("cpu"))


def measured(runner: FakeRunner, cache: KvCache, has_head: bool = True) -> Speed:
    return measure(cast(Runner, runner), cache, 3, has_head, runner.clock_s)


def test_it_says_what_layers_and_head_take() -> None:
    runner, cache = FakeRunner(0.000_2, 0.000_01), make_cache()
    speed = measured(runner, cache)
    assert speed.decode_us == (210, 240, 360)
    assert speed.prefill_us == (840, 2760)
    assert speed.head_us == (2100, 2400, 3600)
    assert set(runner.num_layers_run[2:]) == {NUM_LAYERS}
    assert runner.spans == {(1, 1), (4, 1), (16, 1), (1, 64), (1, 256)}
    assert not measured(runner, cache, has_head=False).has_head


def test_the_cache_is_left_as_it_was() -> None:
    cache = make_cache()
    measured(FakeRunner(0.001, 0.001), cache)
    assert cache.num_free_tokens == cache.num_tokens
    assert list(cache.open(40).blocks) == [0, 1, 2]


@given(base_s=st.floats(1e-7, 30), row_s=st.floats(0, 1), num_blocks=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_it_is_short_whatever_the_shard(base_s: float, row_s: float, num_blocks: int) -> None:
    """Beyond the budget: the slow first pass, one of a single row, and one that took longer than reckoned."""
    runner = FakeRunner(base_s, row_s)
    speed = measured(runner, make_cache(num_blocks))
    assert runner.now_s <= 1.0 + BUDGET_S + 12 * runner.cost_s(1)
    assert list(speed.decode_us) == sorted(speed.decode_us)


def test_a_slow_shard_is_reckoned_in_proportion() -> None:
    """One row of one layer takes a second: sixteen are not waited for."""
    runner = FakeRunner(0.0, 1.0)
    speed = measured(runner, make_cache(), has_head=False)
    assert speed.decode_us == (1_000_000, 4_000_000, 16_000_000)
    assert speed.prefill_us == (60_000_000, 60_000_000)
    assert runner.now_s < 5


def test_a_cache_of_one_block_is_enough() -> None:
    speed = measured(FakeRunner(0.0, 0.001), make_cache(1))
    assert speed.decode_us == (1000, 4000, 16000)
    assert speed.prefill_us == (64_000, 256_000)


def test_a_real_shard_is_measured_when_it_is_loaded(llama: TinyModel) -> None:
    whole, part = load(llama.package, 0, 4), load(llama.package, 0, 2)
    assert whole.speed.has_head
    assert not part.speed.has_head
    assert len(whole.speed.decode_us) == len(DECODE_ROWS)
    assert len(whole.speed.prefill_us) == len(PREFILL_ROWS)
    assert whole.cache.num_free_tokens == whole.cache.num_tokens >= BLOCK_TOKENS


@pytest.mark.parametrize(
    ("decode_us", "prefill_us", "head_us"),
    [
        ((1, 2), (1, 2), (0, 0, 0)),
        ((0, 1, 1), (1, 2), (0, 0, 0)),
        ((1, 1, 10**9), (1, 2), (0, 0, 0)),
        ((1, 1, 1), (1, -2), (0, 0, 0)),
        ((1, 1, 1), (1, 2), (0, 0, 1)),
        ((1, 1, 1), (1, 2), ()),
    ],
)
def test_impossible_times_are_no_speed(
    decode_us: tuple[int, ...], prefill_us: tuple[int, ...], head_us: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="impossible"):
        Speed(decode_us, prefill_us, head_us)


def test_times_between_sizes_lie_on_a_line() -> None:
    speed = Speed((100, 160, 400), (640, 1280), (10, 40, 160))
    assert [speed.layer_ns(rows) for rows in (1, 2, 4, 10, 16, 28)] == [
        100_000,
        120_000,
        160_000,
        280_000,
        400_000,
        640_000,
    ]
    assert speed.head_ns(2) == 20_000
    assert speed.prefill_ns_per_token == 5000
    # A measurement that was disturbed never makes more rows cost less than none.
    assert Speed((100, 160, 50), (1, 1)).layer_ns(100) == 50_000


def test_a_shard_without_the_head_does_not_make_it_unknown() -> None:
    with_head, without = Speed((1, 2, 3), (4, 5), (7, 8, 9)), Speed((2, 3, 4), (5, 6))
    assert without.or_head_of(with_head) == Speed((2, 3, 4), (5, 6), (7, 8, 9))
    assert without.or_head_of(None) == without
    assert with_head.or_head_of(Speed((1, 1, 1), (1, 1), (1, 1, 1))) == with_head
