"""What runs the layers of a shard: transformers' modules on any device, or the C++ kernels on CPUs.

The kernels take what is packed or bfloat16 and of a family they know. Float32 stays with transformers'
modules: it is asked for where results must be the reference's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from node.engine.attention import PagedStep
from node.engine.native.abi import Kernels
from node.engine.native.architecture import why_not
from node.engine.native.native_shard import NativeShard
from node.engine.packed import PackedWeight
from node.engine.shard import Shard

log = logging.getLogger(__name__)


class Runner(Protocol):
    """Layers `[start_layer, end_layer)`, with the embedding if first and final norm and head if last.

    `dtype` is that of the rows, `weight_dtype` that of weights which are not packed, `cache_dtype` that of
    the KV cache. T tokens, D hidden size, B rows, V vocabulary.
    """

    start_layer: int
    end_layer: int
    dtype: torch.dtype
    device: torch.device

    @property
    def weight_dtype(self) -> torch.dtype: ...

    @property
    def cache_dtype(self) -> torch.dtype: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def num_weight_bytes(self) -> int: ...

    def parameter_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]: ...

    def set_parameter(self, name: str, tensor: Tensor) -> None: ...

    def set_packed(self, name: str, packed: PackedWeight) -> None: ...

    def release_others(self) -> None:
        """All weights are set."""
        ...

    def embed(self, ids_T: Tensor) -> Tensor: ...

    def run(self, hidden_TD: Tensor, positions_T: Tensor, step: PagedStep, start: int, end: int) -> Tensor:
        """Layers `[start, end)`. `hidden_TD` may be overwritten."""
        ...

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """`[B, V]` in float32."""
        ...


def make_runner(
    config: PreTrainedConfig,
    start_layer: int,
    end_layer: int,
    dtype: torch.dtype,
    is_packed: bool,
    device: torch.device,
    kernels: Kernels | None,
) -> Runner:
    """Still without weights."""
    if kernels is not None and device.type == "cpu" and (is_packed or dtype == torch.bfloat16):
        reason = why_not(config)
        if reason is None:
            return NativeShard(kernels, config, start_layer, end_layer, dtype, torch.get_num_threads())
        log.warning("the C++ kernels cannot run this model: %s", reason)
    return Shard(config, start_layer, end_layer, dtype, device)
