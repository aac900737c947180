"""Filling a runner from weight files: own tensors only, one at a time, progress in bytes.

Every tensor comes out in the runner's dtype, or packed where the plan says so. What llama.cpp's converter did
to the values of a GGUF file is undone (rows of q and k permuted for llama, one added to gemma's norms).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from node.engine.packed import PackedWeight, from_float, from_gguf
from node.models.bundle import check_config
from node.models.errors import ModelError
from node.models.manifest import Manifest
from node.models.quantization import GGUF_BITS, num_bits_of, num_bytes_of
from node.models.tensors import EMBEDDING, HEAD, TensorPlace
from node.models.weights import Weights

Progress = Callable[[int, int], None]
"""`progress(bytes_done, bytes_total)`."""

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class WeightSink(Protocol):
    """What is filled: it names the parameters it wants and gets each once, in that order.

    Packed weights stay on the CPU until the sink moves them; a tied head gets the embedding's own object.
    """

    @property
    def weight_dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def parameter_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]: ...

    def set_parameter(self, name: str, tensor: Tensor) -> None: ...

    def set_packed(self, name: str, packed: PackedWeight) -> None: ...


def read_config(manifest: Manifest, model_dir: Path) -> PreTrainedConfig:
    """The config of a bundle. Raises ModelError when it is not supported, or not the manifest's."""
    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
    check_config(config, model_dir)
    _check_is_of(manifest, config, model_dir)
    return config


def fill(
    sink: WeightSink,
    config: PreTrainedConfig,
    model_name: str,
    paths: Sequence[Path],
    max_num_bits: int | None,
    progress: Progress,
    max_num_bytes: int | None = None,
) -> int:
    """Sets every parameter of the sink and returns the bytes read. `max_num_bits` is as in
    `node.models.quantization`. Raises ModelError for files that do not fit the config, weights that are not
    finite, and parameters that need more memory than `max_num_bytes`.
    """
    weights = Weights(paths)
    try:
        shapes = dict(sink.parameter_shapes())
        places = _own_places(shapes, weights)
        float_bytes = sink.weight_dtype.itemsize
        needed = sum(num_bytes_of(place, max_num_bits, float_bytes) for place in places.values())
        check_room(model_name, needed, max_num_bytes)
        for name, value in _read_all(shapes, weights, config, sink, max_num_bits, progress):
            if isinstance(value, PackedWeight):
                sink.set_packed(name, value)
            else:
                sink.set_parameter(name, value)
        return weights.num_bytes_read
    finally:
        weights.close()


def check_room(model_name: str, num_bytes: int, max_num_bytes: int | None) -> None:
    if max_num_bytes is not None and num_bytes > max_num_bytes:
        raise ModelError(
            f"{model_name}: these layers need {_mib(num_bytes)} of memory, {_mib(max_num_bytes)} are "
            f"free, {_mib(num_bytes - max_num_bytes)} are missing"
        )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def _check_is_of(manifest: Manifest, config: PreTrainedConfig, model_dir: Path) -> None:
    """Sizes are planned with the manifest and allocated by the config."""
    for what, planned, configured in (
        ("model_type", manifest.model_type, config.model_type),
        ("num_hidden_layers", manifest.num_layers, config.num_hidden_layers),
        ("hidden_size", manifest.hidden_size, config.hidden_size),
        ("vocab_size", manifest.vocab_size, config.vocab_size),
    ):
        if planned != configured:
            raise ModelError(f"{model_dir}: the config's {what} is {configured}, the manifest's {planned}")


def _own_places(shapes: dict[str, tuple[int, ...]], weights: Weights) -> dict[str, TensorPlace]:
    """By the name in the file: what is tied is there once. Raises ModelError for another shape."""
    places = [weights.place(_stored_name(name, weights)) for name in shapes]
    for place, shape in zip(places, shapes.values(), strict=True):
        if place.shape != shape:
            raise ModelError(f"{place.path}: {place.name} has shape {place.shape}, the config says {shape}")
    return {place.name: place for place in places}


def _stored_name(name: str, weights: Weights) -> str:
    """A head that is tied to the embedding has no tensor of its own."""
    return EMBEDDING if name == HEAD and HEAD not in weights.tensors else name


def _read_all(
    shapes: dict[str, tuple[int, ...]],
    weights: Weights,
    config: PreTrainedConfig,
    sink: WeightSink,
    max_num_bits: int | None,
    progress: Progress,
) -> Iterator[tuple[str, Tensor | PackedWeight]]:
    places = _own_places(shapes, weights)
    total_bytes = sum(place.size_bytes for place in places.values())
    done_bytes = 0
    embedding: Tensor | PackedWeight | None = None
    for name in shapes:
        place = places[_stored_name(name, weights)]
        # Only the embedding can be asked for twice, as the head.
        if place.name == EMBEDDING and embedding is not None:
            yield name, embedding
            continue
        num_bits = num_bits_of(place, max_num_bits)
        value = _read(place, weights, config, num_bits)
        if not isinstance(value, PackedWeight):
            value = value.to(dtype=sink.weight_dtype, device=sink.device)
        _check_finite(value, place)
        weights.forget(place.name)
        embedding = value if place.name == EMBEDDING else embedding
        done_bytes += place.size_bytes
        progress(done_bytes, total_bytes)
        yield name, value


def _read(
    place: TensorPlace, weights: Weights, config: PreTrainedConfig, num_bits: int | None
) -> Tensor | PackedWeight:
    raw = np.frombuffer(weights.read(place.name), dtype=np.uint8)
    architecture = weights.gguf_architecture
    num_heads = _num_permuted_heads(place.name, architecture, config)
    if num_bits is not None and GGUF_BITS.get(place.encoding) == num_bits:
        packed = from_gguf(raw, place.encoding, (place.shape[0], place.shape[1]))
        return packed.rows(_unpermuted_rows(place.shape[0], num_heads)) if num_heads else packed
    values = _floats_of_safetensors(raw, place) if architecture is None else _dequantize(raw, place)
    if num_heads:
        values = values[_unpermuted_rows(place.shape[0], num_heads)]
    if architecture == "gemma3" and place.name.endswith("norm.weight"):
        values -= 1
    return values if num_bits is None else from_float(values, num_bits)


def _floats_of_safetensors(raw: np.ndarray, place: TensorPlace) -> Tensor:
    if place.encoding not in _SAFETENSORS_DTYPES:
        supported = ", ".join(_SAFETENSORS_DTYPES)
        raise ModelError(f"{place.path}: {place.name} is stored as {place.encoding} (supported: {supported})")
    # A copy: torch does not take read-only memory without a warning.
    return torch.from_numpy(raw.copy()).view(_SAFETENSORS_DTYPES[place.encoding]).reshape(place.shape)


def _dequantize(raw: np.ndarray, place: TensorPlace) -> Tensor:
    blocks = raw.reshape(*place.shape[:-1], -1)
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[place.encoding])
    # Writable: values that need no unpacking would be the mapped file itself.
    return torch.from_numpy(np.require(values, np.float32, ["C", "W"])).reshape(place.shape)


def _check_finite(value: Tensor | PackedWeight, place: TensorPlace) -> None:
    if isinstance(value, PackedWeight):
        is_finite = value.is_finite
    else:
        is_finite = all(bool(extreme.isfinite()) for extreme in value.aminmax())
    if not is_finite:
        raise ModelError(f"{place.path}: {place.name} holds NaN or values beyond the range of its type")


def _num_permuted_heads(name: str, architecture: str | None, config: PreTrainedConfig) -> int:
    if architecture == "llama" and ".self_attn.q_proj." in name:
        return int(config.num_attention_heads)
    if architecture == "llama" and ".self_attn.k_proj." in name:
        return int(config.num_key_value_heads)
    return 0


def _unpermuted_rows(num_rows: int, num_heads: int) -> Tensor:
    """llama.cpp interleaves the two halves of each head's rotary dimensions; transformers has them apart."""
    paired = torch.arange(num_rows).view(num_heads, num_rows // num_heads // 2, 2)
    return paired.transpose(1, 2).reshape(num_rows)
