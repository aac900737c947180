"""Attention over the paged cache is attention: any mix of sessions, blocks anywhere, NaN where none wrote."""

from __future__ import annotations

import random
from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from node.engine.attention import PagedStep, Span, attend
from node.engine.attention_plan import MAX_PADDING, MIN_TOKENS_IN_PLACE, make_plan
from node.engine.kv_cache import BLOCK_TOKENS, BlockTable, KvCache

CPU = torch.device("cpu")
NUM_KV_HEADS, NUM_GROUPS, HEAD_DIM = 2, 3, 8
NUM_HEADS = NUM_KV_HEADS * NUM_GROUPS
NUM_BLOCKS = 160

inputs = st.tuples(
    st.one_of(st.integers(0, 40), st.integers(0, 400)),
    st.one_of(st.just(1), st.integers(1, 16), st.integers(1, 60)),
)


def table_of(num_tokens: int, free: list[int], is_scattered: bool, rng: random.Random) -> BlockTable:
    num_blocks = -(-num_tokens // BLOCK_TOKENS)
    blocks = [free.pop() for _ in range(num_blocks)]
    blocks.sort()
    if is_scattered:
        rng.shuffle(blocks)
    return BlockTable(array("i", blocks), CPU)


def plainly(
    query_HTD: Tensor, key_KLD: Tensor, value_KLD: Tensor, window: int | None, softcap: float | None
) -> Tensor:
    """One session; the last T of L tokens ask. -> `[T, H, D]`."""
    num_tokens, length = query_HTD.shape[1], key_KLD.shape[1]
    scores = query_HTD @ key_KLD.repeat_interleave(NUM_GROUPS, 0).transpose(1, 2) * HEAD_DIM**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(length - num_tokens, length)[:, None] - torch.arange(length)
    is_hidden = (distance < 0) | (distance >= (window or length))
    weights = scores.masked_fill(is_hidden, float("-inf")).softmax(-1)
    return (weights @ value_KLD.repeat_interleave(NUM_GROUPS, 0)).transpose(0, 1)


@settings(max_examples=150, deadline=None)
@given(
    sessions=st.lists(inputs, min_size=1, max_size=9),
    window=st.sampled_from([None, 1, 8, 150]),
    softcap=st.sampled_from([None, 5.0]),
    cache_dtype=st.sampled_from([torch.float32, torch.float16]),
    is_scattered=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_mix_of_sessions_attends_as_each_would_alone(
    sessions: list[tuple[int, int]],
    window: int | None,
    softcap: float | None,
    cache_dtype: torch.dtype,
    is_scattered: bool,
    seed: int,
) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    cache = KvCache(0, 1, NUM_BLOCKS * 2, NUM_KV_HEADS, HEAD_DIM, cache_dtype, CPU)
    for stored in cache.layer(0):
        stored.fill_(float("nan"))
    free = list(range(NUM_BLOCKS * 2))
    spans, keys, values, queries, expected = [], [], [], [], []
    for position, num_tokens in sessions:
        end = position + num_tokens
        key, value = torch.randn(2, NUM_KV_HEADS, end, HEAD_DIM, generator=generator).to(cache_dtype).float()
        query = torch.randn(NUM_HEADS, num_tokens, HEAD_DIM, generator=generator)
        table = table_of(end, free, is_scattered, rng)
        if position:
            PagedStep(cache, [Span(table, 0, position)]).write(0, key[:, :position], value[:, :position])
        spans.append(Span(table, position, num_tokens))
        keys.append(key[:, position:])
        values.append(value[:, position:])
        queries.append(query)
        expected.append(plainly(query, key, value, window, softcap))
    step = PagedStep(cache, spans)
    stored = step.write(0, torch.cat(keys, 1), torch.cat(values, 1))
    output = attend(torch.cat(queries, 1), *stored, step, None, window, softcap)
    torch.testing.assert_close(output, torch.cat(expected), atol=1e-5, rtol=1e-4)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 2000), min_size=2, max_size=32))
def test_padding_is_bounded(lengths: list[int]) -> None:
    tables = [BlockTable(array("i", range(125, 0, -1)), CPU) for _ in lengths]
    spans = [Span(table, length - 1, 1) for table, length in zip(tables, lengths, strict=True)]
    plan = make_plan(spans, None, CPU, torch.float32)
    num_read = sum(len(part.slots) for part in plan.parts)
    assert num_read <= MAX_PADDING * sum(lengths) + BLOCK_TOKENS * len(lengths)
    assert len(plan.parts) <= 9


@pytest.mark.parametrize(("length", "num_calls"), [(MIN_TOKENS_IN_PLACE - 1, 1), (MIN_TOKENS_IN_PLACE, 4)])
def test_long_runs_are_read_in_place(length: int, num_calls: int) -> None:
    tables = [BlockTable(array("i", range(first, first + 20)), CPU) for first in range(0, 80, 20)]
    plan = make_plan([Span(table, length - 1, 1) for table in tables], None, CPU, torch.float32)
    assert len(plan.parts) == num_calls
