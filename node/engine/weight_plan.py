"""How the weights of one shard are kept on this device: packed or as floats, which type, how many bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from node.engine.device import choose_dtype
from node.models.manifest import Manifest
from node.models.quantization import max_num_bits, num_bytes_of, weight_type
from node.models.tensors import EMBEDDING, FINAL_NORM, HEAD, TensorPlace, layer_of
from node.models.weights import Weights


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """`dtype` is that of the rows and of all that is not packed; `max_num_bits` None: nothing is packed."""

    dtype: torch.dtype
    max_num_bits: int | None
    weight_type: str
    num_bytes: int


def plan_weights(
    manifest: Manifest,
    paths: Sequence[Path],
    start_layer: int,
    end_layer: int,
    name: str,
    device: torch.device,
    free_bytes: int,
    has_kernels: bool,
) -> WeightPlan:
    """`name` is the type that was asked for. Raises ModelError for damaged files and missing tensors.

    "auto" takes packed files as they are and bfloat16 files as bfloat16 where there are kernels for them (on
    CPUs with a compiler). Elsewhere floats are faster, and chosen while they leave half of the memory.
    """
    weights = Weights(paths)
    try:
        all_places = list(weights.tensors.values())
        own = _own_places(weights, start_layer, end_layer, manifest.num_layers)
    finally:
        weights.close()
    num_parameters = sum(place.num_parameters for place in own)
    most = max_num_bits(name, all_places)
    dtype = choose_dtype("auto" if most is not None else name, device, num_parameters, free_bytes)
    if name == "auto" and has_kernels:
        dtype = torch.bfloat16 if _are_mostly_bfloat16(all_places) else dtype
    elif name == "auto" and num_parameters * dtype.itemsize * 2 <= free_bytes:
        most = None
    if most is None:
        type_name = str(dtype).removeprefix("torch.")
        return WeightPlan(dtype, None, type_name, num_parameters * dtype.itemsize)
    dtype = choose_dtype("auto", device, 0, free_bytes)
    num_bytes = sum(num_bytes_of(place, most, dtype.itemsize) for place in own)
    return WeightPlan(dtype, most, weight_type(most, own), num_bytes)


def _are_mostly_bfloat16(places: Sequence[TensorPlace]) -> bool:
    num_values = sum(place.num_parameters for place in places if place.encoding == "BF16")
    return 2 * num_values > sum(place.num_parameters for place in places)


def _own_places(weights: Weights, start_layer: int, end_layer: int, num_layers: int) -> list[TensorPlace]:
    """A head tied to the embedding of the same shard counts once."""
    names = {name for name in weights.tensors if start_layer <= _layer(name) < end_layer}
    if start_layer == 0:
        names.add(EMBEDDING)
    if end_layer == num_layers:
        names |= {FINAL_NORM, HEAD if HEAD in weights.tensors else EMBEDDING}
    return [weights.place(name) for name in sorted(names)]


def _layer(name: str) -> int:
    layer = layer_of(name)
    return -1 if layer is None else layer
