"""Loading tiny packed models into a recorder or a runner, and how far their logits are from float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from node.engine.attention import PagedStep, Span
from node.engine.kv_cache import KvCache
from node.engine.loader import fill, read_config
from node.engine.native.abi import Kernels
from node.engine.packed import PackedWeight
from node.engine.runner import Runner, make_runner
from node.engine.shard import Shard
from node.engine.weight_plan import WeightPlan, plan_weights
from node.models.bundle import make_bundle_here
from node.models.package import ModelPackage, build_package
from tests.engine.tiny_gguf import NUM_LAYERS, VOCAB_SIZE, TinyGguf, make_tiny_gguf

CPU = torch.device("cpu")
GIB = 1 << 30
MIXED = {"ffn_down": "Q6_K", "attn_v": "F16", "token_embd": "Q8_0"}


@dataclass
class Recorder:
    """A sink that keeps what it is given."""

    shard: Shard
    weight_dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    given: dict[str, Tensor | PackedWeight] = field(default_factory=dict)

    def parameter_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        return self.shard.parameter_shapes()

    def set_parameter(self, name: str, tensor: Tensor) -> None:
        self.given[name] = tensor

    def set_packed(self, name: str, packed: PackedWeight) -> None:
        self.given[name] = packed

    @property
    def num_bytes(self) -> int:
        parts = {id(v): v for v in self.given.values()}.values()
        return sum(v.num_bytes if isinstance(v, PackedWeight) else v.nbytes for v in parts)


class FloatSizes(TorchDispatchMode):
    """How many values the largest float tensor has that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, Tensor) and made.is_floating_point():
                self.largest = max(self.largest, made.numel())
        return result


def plan(package: ModelPackage, dtype: str = "auto", start: int = 0, end: int = NUM_LAYERS) -> WeightPlan:
    manifest, weights = package.manifest, package.weights
    return plan_weights(manifest, weights, start, end, dtype, CPU, 64 * GIB, has_kernels=True)


def record(package: ModelPackage, planned: WeightPlan, start: int = 0, end: int = NUM_LAYERS) -> Recorder:
    config = read_config(package.manifest, package.directory)
    recorder = Recorder(Shard(config, start, end, torch.float32, CPU))
    fill(recorder, config, "m", package.weights, planned.max_num_bits, lambda *_: None, planned.num_bytes)
    return recorder


def load(package: ModelPackage, dtype: str = "auto", kernels: Kernels | None = None) -> Runner:
    planned = plan(package, dtype)
    config = read_config(package.manifest, package.directory)
    is_packed = planned.max_num_bits is not None
    runner = make_runner(config, 0, NUM_LAYERS, planned.dtype, is_packed, CPU, kernels)
    most, num_bytes = planned.max_num_bits, planned.num_bytes
    fill(runner, config, "m", package.weights, most, lambda *_: None, num_bytes)
    runner.release_others()
    return runner


@torch.inference_mode()
def logits_of(runner: Runner, ids: Tensor) -> Tensor:
    """`[T, vocabulary]` of one prompt, prefilled at once."""
    num_blocks = -(-len(ids) // 16)
    cache = KvCache(0, NUM_LAYERS, num_blocks, 2, runner.head_dim, runner.cache_dtype, CPU)
    step = PagedStep(cache, [Span(cache.open(len(ids)), 0, len(ids))])
    hidden = runner.run(runner.embed(ids), torch.arange(len(ids)), step, 0, NUM_LAYERS)
    return runner.logits(hidden)


# Of the logits, relative, with random weights, which are the hardest to quantize (docs/decisions.md).
BOUNDS = {"auto": 0.03, "int8": 0.04, "int4": 0.35}
IDS = torch.randint(3, VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def distance(runner: Runner, model: TinyGguf) -> float:
    """Of the logits from transformers' in float32 on the dequantized file, relative."""
    expected = model.reference(IDS[None]).logits[0]
    return float((logits_of(runner, IDS) - expected).norm() / expected.norm())


def quantized_safetensors(directory: Path, dtype: str) -> tuple[ModelPackage, TinyGguf]:
    """The same model once more, saved by transformers."""
    model = make_tiny_gguf(directory, "llama", "F16", is_tied=False)
    source = directory / "saved"
    model.reference.save_pretrained(source)
    package = build_package(
        str(source), dtype, directory / "models", make_bundle=lambda _, there: _copy_config(source, there)
    )
    return package, model


def _copy_config(source: Path, directory: Path) -> Any:
    return make_bundle_here(source, directory)
