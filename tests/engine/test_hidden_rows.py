"""Hidden states in 8 bits: how far a value can move, what 8 bits cannot say, and what it does to a model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from node.engine.hidden_rows import AUTO_BITS, are_8_bits_due, are_finite, floats, hidden_batch, rows_tensor
from node.engine.int8_rows import dequantize_rows, quantize_rows
from node.links.batches import num_row_bytes
from node.links.codec import PREFIX_BYTES, decode, encode, parse_prefix
from node.links.frames import Dtype, HiddenBatch, HiddenItem, Lane, Sampling, TokenBatch
from tests.engine.ring import Ring, wait_until
from tests.engine.tiny import TinyModel

PROMPT = [150, 7, 33, 80, 12, 191, 64]
GROUP = 64
# Half of a scale that was rounded up to float16, of the largest value of the group, which is 127 scales.
RELATIVE_BOUND = 1 / 253
ABSOLUTE_BOUND = 2.0**-25


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """Rows of any width, with groups of very different size in one row."""
    num_rows, hidden_size = draw(st.integers(1, 4)), draw(st.integers(1, 200))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values_TD = torch.randn(num_rows, hidden_size, generator=generator)
    exponents = draw(st.lists(st.integers(-40, 20), min_size=4, max_size=4))
    for group, exponent in enumerate(exponents):
        values_TD[:, group * GROUP : (group + 1) * GROUP] *= 2.0**exponent
    values_TD[torch.rand(values_TD.shape, generator=generator) < draw(st.floats(0, 1))] = 0.0
    return values_TD


def frame_of(rows_TD: Tensor, is_8_bits: bool = True) -> HiddenBatch:
    """Through the bytes of a link."""
    batch = hidden_batch([HiddenItem(bytes(16), 0, len(rows_TD))], [rows_TD], is_8_bits)
    first, payload = encode(batch)
    prefix = parse_prefix(first[:PREFIX_BYTES], Lane.BULK)
    received = decode(prefix, first[PREFIX_BYTES:], bytearray(payload))
    assert isinstance(received, HiddenBatch)
    return received


@given(rows())
@settings(max_examples=300, deadline=None)
def test_a_value_moves_by_at_most_half_a_scale(rows_TD: Tensor) -> None:
    frame = frame_of(rows_TD)
    assert frame.dtype is Dtype.INT8
    assert len(frame.rows) == len(rows_TD) * num_row_bytes(Dtype.INT8, rows_TD.shape[1])
    back_TD = floats(rows_tensor(frame), frame.hidden_size)
    for start in range(0, rows_TD.shape[1], GROUP):
        group_TG, back_TG = rows_TD[:, start : start + GROUP], back_TD[:, start : start + GROUP]
        bound_T1 = group_TG.abs().amax(1, keepdim=True) * RELATIVE_BOUND + ABSOLUTE_BOUND
        assert bool(((group_TG - back_TG).abs() <= bound_T1).all())


@given(rows(), st.sampled_from([math.nan, math.inf, -math.inf, 9e6, -3e38]), st.data())
@settings(max_examples=100, deadline=None)
def test_what_8_bits_cannot_say_travels_as_it_is(rows_TD: Tensor, value: float, data: st.DataObject) -> None:
    rows_TD[0, data.draw(st.integers(0, rows_TD.shape[1] - 1))] = value
    assert quantize_rows(rows_TD) is None
    frame = frame_of(rows_TD)
    assert frame.dtype is Dtype.FLOAT32
    assert torch.equal(rows_tensor(frame).nan_to_num(7.0), rows_TD.nan_to_num(7.0))
    assert are_finite(rows_tensor(frame), frame.hidden_size) == math.isfinite(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_any_float_type_can_be_made_small(dtype: torch.dtype) -> None:
    rows_TD = torch.linspace(-3, 3, 2 * 100).view(2, 100).to(dtype)
    small_TB = quantize_rows(rows_TD)
    assert small_TB is not None
    assert small_TB.shape == (2, 100 + 2 * 2)
    assert float((dequantize_rows(small_TB, 100) - rows_TD.float()).abs().max()) <= 3 * RELATIVE_BOUND


def test_zeros_stay_zeros() -> None:
    small_TB = quantize_rows(torch.zeros(1, 65))
    assert small_TB is not None
    assert not dequantize_rows(small_TB, 65).any()


def test_a_sum_too_large_is_not_taken_for_a_wrong_value() -> None:
    assert are_finite(torch.full((1, 8), 3e38), 8)
    assert not are_finite(torch.tensor([[math.inf, -math.inf]]), 2)


def test_a_long_way_is_where_auto_sends_8_bits() -> None:
    assert [are_8_bits_due(16, 10**6), are_8_bits_due(8, 0)] == [False, True]
    assert [are_8_bits_due(AUTO_BITS, us) for us in (0, 200, 10_000)] == [False, False, True]


def logprobs(model: TinyModel, hidden_bits: int) -> tuple[list[int], list[float], float]:
    """Greedy ids, their logprobs, and bytes per row between the stages."""
    with Ring(model.package, (1, 3), hidden_bits=hidden_bits) as ring:
        sampling = Sampling(temperature=0, max_num_output_tokens=12, ignore_eos=True, num_top_logprobs=0)
        heard = ring.open(opening := ring.opening(PROMPT, sampling))
        ring.start(opening)
        wait_until(lambda: heard.is_over)
        assert not heard.errors
        sent = [engine.links.counts().sent[HiddenBatch].num_bytes for engine in ring.engines[:2]]
        assert TokenBatch in ring.engines[2].links.counts().sent
        return heard.tokens, [item.logprob or 0.0 for item in heard.items], sum(sent)


def test_8_bits_between_three_stages_move_logprobs_by_little(llama: TinyModel) -> None:
    ids, exact, num_exact_bytes = logprobs(llama, 16)
    small_ids, small, num_small_bytes = logprobs(llama, 8)
    assert num_small_bytes < 0.62 * num_exact_bytes
    num_same = next((n for n, pair in enumerate(zip(ids, small_ids, strict=True)) if pair[0] != pair[1]), 12)
    assert num_same >= 4
    distances = [abs(a - b) for a, b in zip(exact[:num_same], small[:num_same], strict=True)]
    # Of a model with random weights and a hidden size of 48: 0.08 was seen.
    assert 0 < max(distances) < 0.15
