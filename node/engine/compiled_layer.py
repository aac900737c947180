"""One decoder layer as a function of its weights: what may share compiled code, and how that code is called.

Layers whose modules, settings and shapes are alike are one kind; compiled code belongs to a kind.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from node.engine.attention import PagedStep
from node.engine.attention_op import running

CODE_VERSION = 1
Code = Callable[[list[Tensor]], Sequence[Tensor]]
"""Weights, hidden `[1, T, D]`, cosine and sine of the rotary embedding -> hidden. It empties the list."""


@dataclass(frozen=True, slots=True)
class CompiledLayer:
    layer: int
    weights: tuple[Tensor, ...]
    code: Code

    def __call__(self, hidden: Tensor, rope: tuple[Tensor, Tensor], step: PagedStep) -> Tensor:
        running.step, running.layer = step, self.layer
        try:
            return self.code([*self.weights, hidden, *rope])[0]
        finally:
            running.step = None


def layer_weights(layer: nn.Module) -> dict[str, Tensor]:
    """In the order compiled code takes them."""
    tensors: list[tuple[str, Tensor]] = [*layer.named_parameters(), *layer.named_buffers()]
    return {name: tensor.detach() for name, tensor in tensors}


def can_compile(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Packed weights stay with their own kernels; other floats until they were seen to come out right."""
    return dtype == torch.float32 and all(parameter.dtype == dtype for parameter in layer.parameters())


def kind_of(layer: nn.Module, config_json: str, dtype: torch.dtype, device: torch.device) -> str:
    """A name for all that compiled code depends on: 64 hexadecimal digits."""
    modules = {name: [type(module).__qualname__, _settings(module)] for name, module in layer.named_modules()}
    shapes = {name: [list(each.shape), str(each.dtype)] for name, each in layer_weights(layer).items()}
    versions = [CODE_VERSION, torch.__version__, transformers.__version__]
    description = [versions, _machine(device), str(dtype), config_json, modules, shapes]
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _settings(module: nn.Module) -> dict[str, object]:
    """Its numbers, texts and switches, but for what differs in every layer."""
    plain = (int, float, str, bool, type(None))
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, plain) and name != "layer_idx"
    }


def _machine(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return ["cuda", torch.cuda.get_device_name(device), str(torch.version.cuda or torch.version.hip)]
    if device.type != "cpu":
        return [device.type, platform.machine(), platform.release()]
    return ["cpu", platform.machine(), torch.backends.cpu.get_cpu_capability(), _cpu_flags()]


def _cpu_flags() -> str:
    """The compiler uses every instruction that is there."""
    try:
        with Path("/proc/cpuinfo").open() as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), "").strip()
    except OSError:
        return platform.processor()
