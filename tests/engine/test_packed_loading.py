"""Packed loading: GGUF weights as they are stored, others quantized; the cost in memory and exactness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from node.engine.loader import fill, read_config
from node.engine.native.build import kernels_or_none
from node.engine.native.native_shard import NativeShard
from node.engine.packed import PackedWeight
from node.engine.shard import Shard
from node.engine.weight_plan import WeightPlan, plan_weights
from node.models.tensors import EMBEDDING, HEAD
from tests.engine.packed_world import (
    BOUNDS,
    CPU,
    GIB,
    MIXED,
    FloatSizes,
    Recorder,
    distance,
    load,
    plan,
    quantized_safetensors,
    record,
)
from tests.engine.tiny_gguf import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE, make_tiny_gguf


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("encoding", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_packed_weights_are_those_of_the_file(
    directory: Path, family: str, encoding: str, is_tied: bool
) -> None:
    model = make_tiny_gguf(directory, family, encoding, {"token_embd": "Q8_0"}, is_tied=is_tied)
    recorder = record(model.package, plan(model.package))
    assert set(recorder.given) == {name for name, _ in recorder.shard.parameter_shapes()}
    for name, value in recorder.given.items():
        expected = model.reference.get_parameter(name)
        assert isinstance(value, PackedWeight) == (expected.ndim == 2)
        values = value.dequantize() if isinstance(value, PackedWeight) else value
        assert torch.equal(values, expected), name
    assert (recorder.given[EMBEDDING] is recorder.given[HEAD]) == is_tied


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_other_types_of_a_packed_file_become_eight_bits(directory: Path, family: str) -> None:
    """Q6_K and F16 are unpacked one tensor at a time and packed again, for half a step of 1/127."""
    model = make_tiny_gguf(directory, family, "Q4_1", MIXED)
    assert plan(model.package).weight_type == "int4"
    for name, value in record(model.package, plan(model.package)).given.items():
        if not isinstance(value, PackedWeight):
            continue
        expected = model.reference.get_parameter(name)
        if "down_proj" in name or "v_proj" in name:
            assert value.bits == 8
            steps = value.scales.float().repeat_interleave(32, dim=1)
            assert bool(((value.dequantize() - expected).abs() <= 0.501 * steps).all())
        else:
            assert torch.equal(value.dequantize(), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("encoding", ["Q4_0", "Q8_0", "F16"])
def test_float32_of_a_gguf_file_is_what_transformers_reads(
    directory: Path, family: str, encoding: str
) -> None:
    model = make_tiny_gguf(directory, family, encoding, MIXED, dtype="float32")
    for name, value in record(model.package, plan(model.package, "float32")).given.items():
        assert isinstance(value, Tensor)
        assert torch.equal(value, model.reference.get_parameter(name)), name
    assert distance(load(model.package, "float32"), model) < 1e-5


@pytest.mark.parametrize(
    ("encoding", "dtype"),
    [("F16", "int8"), ("F16", "int4"), ("Q4_1", "auto"), ("Q8_0", "auto"), ("Q8_0", "int4")],
)
@pytest.mark.parametrize("is_native", [False, True])
def test_logits_are_within_the_stated_distance_of_float32(
    directory: Path, encoding: str, dtype: str, is_native: bool
) -> None:
    """Stored codes lose nothing but the kernels' bfloat16, or eight bits of the rows they multiply."""
    kernels = kernels_or_none() if is_native else None
    if is_native and kernels is None:
        pytest.skip("no compiler")
    model = make_tiny_gguf(directory, "llama", encoding, {"token_embd": "Q8_0"}, dtype)
    runner = load(model.package, dtype, kernels)
    assert isinstance(runner, NativeShard) == is_native
    assert distance(runner, model) < BOUNDS[dtype]


def test_nothing_is_dequantized_on_the_way(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation makes as many floats as the smallest packed matrix has; gguf unpacks only norms."""
    model = make_tiny_gguf(directory, "llama", "Q4_0", {"token_embd": "Q8_0"})
    unpacked: list[int] = []
    dequantize = gguf.quants.dequantize

    def watched(data: Any, kind: gguf.GGMLQuantizationType) -> Any:
        unpacked.append(data.size)
        return dequantize(data, kind)

    monkeypatch.setattr(gguf.quants, "dequantize", watched)
    config = read_config(model.package.manifest, model.package.directory)
    recorder = Recorder(Shard(config, 0, NUM_LAYERS, torch.float32, CPU))
    with FloatSizes() as sizes:
        fill(recorder, config, "m", model.package.weights, 8, lambda *_: None)
    assert unpacked == [4 * HIDDEN_SIZE] * (2 * NUM_LAYERS + 1)
    # Scales and minima, one for 32 values each.
    assert sizes.largest < 128 * HIDDEN_SIZE


def test_memory_is_what_was_planned(directory: Path) -> None:
    for encoding in ("Q4_0", "Q8_0"):
        model = make_tiny_gguf(directory, "qwen2", encoding, MIXED)
        manifest = model.package.manifest
        for start, end in ((0, 1), (1, 2), (0, 2)):
            planned = plan(model.package, "auto", start, end)
            assert record(model.package, planned, start, end).num_bytes == planned.num_bytes
            tied = manifest.embedding_num_bytes if (start, end) == (0, 2) else 0
            assert planned.num_bytes == manifest.stage_bytes(start, end) - tied


def test_a_pod_plans_and_shows_what_weights_become(directory: Path) -> None:
    plain = make_tiny_gguf(directory, "llama", "F16")
    assert (plain.package.manifest.version, plain.package.manifest.weight_type) == (1, "auto")
    assert plan(plain.package).weight_type == "float32"
    whole = {dtype: plan(plain.package, dtype) for dtype in ("float32", "bfloat16", "int8", "int4")}
    assert {planned.weight_type for planned in whole.values()} == set(whole)
    sizes = [planned.num_bytes for planned in whole.values()]
    assert sizes == sorted(sizes, reverse=True)
    tight = make_tiny_gguf(directory, "llama", "Q8_0", dtype="int4").package
    assert (tight.manifest.version, tight.manifest.weight_type) == (2, "int4")
    # What a file packs as tightly is never packed again.
    assert plan(make_tiny_gguf(directory, "llama", "Q4_0").package, "int8").weight_type == "int4"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_where_there_are_no_kernels_packed_files_are_unpacked_while_there_is_room(
    directory: Path, device: str
) -> None:
    package = make_tiny_gguf(directory, "llama", "Q4_0").package

    def planned(free_bytes: int) -> WeightPlan:
        manifest, weights, target = package.manifest, package.weights, torch.device(device)
        return plan_weights(manifest, weights, 0, NUM_LAYERS, "auto", target, free_bytes, has_kernels=False)

    assert planned(GIB).weight_type == ("float32" if device == "cpu" else "bfloat16")
    num_bytes = 2 * (package.manifest.stage_num_parameters(0, NUM_LAYERS) - VOCAB_SIZE * HIDDEN_SIZE)
    assert planned(2 * num_bytes).weight_type == "bfloat16"
    assert planned(2 * num_bytes - 1).weight_type == "int4"


def test_kernels_take_bfloat16_files_as_they_are(directory: Path) -> None:
    package = make_tiny_gguf(directory, "llama", "BF16").package
    assert plan(package).weight_type == "bfloat16"
    assert plan(package, "float32").weight_type == "float32"


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_safetensors_are_quantized_as_they_are_loaded(directory: Path, dtype: str) -> None:
    """Embedding and head keep eight bits; float memory is one matrix at a time."""
    package, model = quantized_safetensors(directory, dtype)
    config = read_config(package.manifest, package.directory)
    recorder = Recorder(Shard(config, 0, NUM_LAYERS, torch.float32, CPU))
    with FloatSizes() as sizes:
        fill(recorder, config, "m", package.weights, plan(package, dtype).max_num_bits, lambda *_: None)
    assert sizes.largest <= 2 * HIDDEN_SIZE * HIDDEN_SIZE
    assert recorder.num_bytes == package.manifest.stage_bytes(0, NUM_LAYERS)
    bits = {n: v.bits for n, v in recorder.given.items() if isinstance(v, PackedWeight)}
    assert {bits.pop(EMBEDDING), bits.pop(HEAD)} == {8}
    assert set(bits.values()) == {int(dtype[3:])}
    assert distance(load(package, dtype), model) < BOUNDS[dtype]
