"""Packed weights: the numbers are gguf's, quantizing keeps its bounds, modules multiply as floats do."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from node.engine.packed import PackedWeight, from_float, from_gguf
from node.engine.packed_linear import KernelLinear, PackedLinear, packed_module
from node.models.quantization import GGUF_BITS, packed_num_bytes

CPU = torch.device("cpu")


def random_weight(num_rows: int, num_columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed)) / 16


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(GGUF_BITS)),
    st.integers(1, 5),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_any_block_means_what_gguf_says(
    encoding: str, num_rows: int, num_groups: int, random: object
) -> None:
    """Any codes, any float16 scale that is not beyond an eighth of its range."""
    kind = GGMLQuantizationType[encoding]
    rng = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    blocks = rng.integers(0, 256, (num_rows, num_groups, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for start in (0, 2) if encoding == "Q4_1" else (0,):
        halves = (rng.standard_normal((num_rows, num_groups)) * 10.0 ** rng.integers(-7, 4)).astype(
            np.float16
        )
        blocks[..., start : start + 2] = halves[..., None].view(np.uint8)
    raw = blocks.reshape(num_rows, -1)
    packed = from_gguf(raw.reshape(-1), encoding, (num_rows, num_groups * 32))
    assert packed.is_finite
    assert packed.num_bytes == packed_num_bytes(packed.shape, packed.bits)
    assert np.array_equal(packed.dequantize().numpy(), gguf.quants.dequantize(raw, kind))


def test_codes_lie_as_the_contract_says() -> None:
    raw = gguf.quants.quantize(random_weight(3, 64).numpy(), GGMLQuantizationType.Q4_1)
    packed = from_gguf(raw, "Q4_1", (3, 64))
    assert packed.codes.shape == (3, 32)
    assert packed.minima is not None
    byte = int(packed.codes[2, 16 + 5])
    scale, minimum = packed.scales[2, 1].float(), packed.minima[2, 1].float()
    values = packed.dequantize()
    assert values[2, 32 + 5] == scale * (byte & 15) + minimum
    assert values[2, 32 + 21] == scale * (byte >> 4) + minimum


@pytest.mark.parametrize("bits", [4, 8])
def test_quantizing_errs_by_half_a_step_at_most(bits: int) -> None:
    """Of four bits, where a refit trades the ends of a group for its middle, less than gguf in the mean."""
    weight = random_weight(96, 256)
    packed = from_float(weight, bits)
    errors = (packed.dequantize() - weight).abs()
    if bits == 8:
        steps = packed.scales.float().repeat_interleave(32, dim=1)
        assert bool((errors <= 0.501 * steps).all())
    else:
        theirs = gguf.quants.quantize(weight.numpy(), GGMLQuantizationType.Q4_1)
        their_errors = from_gguf(theirs, "Q4_1", (96, 256)).dequantize() - weight
        assert errors.square().mean() <= their_errors.square().mean()
    assert packed.dequantize(torch.bfloat16).dtype is torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
def test_extremes_survive_quantizing(bits: int) -> None:
    weight = torch.zeros(4, 64)
    weight[1] = 0.25
    weight[2, 7] = -3.0
    packed = from_float(weight, bits)
    assert packed.is_finite
    assert torch.allclose(packed.dequantize(), weight, atol=2e-3)
    for worst in (float("nan"), float("inf"), -float("inf"), 1e30):
        weight[3, 5] = worst
        assert not from_float(weight, bits).is_finite


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_stay_packed(bits: int) -> None:
    packed = from_float(random_weight(10, 64), bits)
    order = torch.tensor([9, 0, 3, 3])
    assert packed.rows(order).bits == bits
    assert torch.equal(packed.rows(order).dequantize(), packed.dequantize()[order])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_rows", [48, 50])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 70)])
def test_a_packed_linear_multiplies_as_its_floats_do(
    bits: int, num_rows: int, shape: tuple[int, ...]
) -> None:
    """Fifty rows are not whole blocks of the kernel; the kernel's bfloat16 is good to 1 % here."""
    packed = from_float(random_weight(num_rows, 128), bits)
    x = torch.randn(*shape, 128, generator=torch.Generator().manual_seed(1))
    bias = torch.linspace(-1, 1, num_rows)
    expected = nn.functional.linear(x, packed.dequantize(), bias)
    for module in (
        packed_module(nn.Linear(128, num_rows), packed, torch.float32, CPU),
        PackedLinear(packed, CPU),
    ):
        module.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
        tolerance = 0.01 if isinstance(module, KernelLinear) else 1e-6
        error = (module(x) - expected).norm() / expected.norm()
        assert float(error) < tolerance
        assert sum(p.nbytes for p in module.parameters()) <= 1.06 * packed.num_bytes + bias.nbytes


@pytest.mark.parametrize("scale", [None, torch.tensor(16.0)])
def test_a_packed_embedding_looks_up_rows(scale: torch.Tensor | None) -> None:
    packed = from_float(random_weight(20, 64), 8)
    original = nn.Embedding(20, 64)
    if scale is not None:
        original.register_buffer("embed_scale", scale)
    ids = torch.tensor([[3, 19, 3]])
    rows = packed_module(original, packed, torch.float32, CPU)(ids)
    assert torch.equal(rows, packed.dequantize()[ids] * (1 if scale is None else scale))


def test_shape_and_bytes() -> None:
    packed = from_float(random_weight(6, 96), 4)
    assert isinstance(packed, PackedWeight)
    assert packed.shape == (6, 96)
    assert packed.num_bytes == packed_num_bytes((6, 96), 4) == 6 * 3 * 20
    assert from_float(random_weight(6, 96), 8).num_bytes == packed_num_bytes((6, 96), 8) == 6 * 3 * 34
