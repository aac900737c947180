"""Filling a shard from weight files: own tensors only, dequantized or cast on the way, progress in bytes.

Undoes what llama.cpp's converter does to the values of a GGUF file (rows of q and k permuted for llama, one
added to gemma's norms).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from node.engine.shard import Shard
from node.models.errors import ModelError
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


def load_shard(
    model_dir: Path,
    paths: Sequence[Path],
    start_layer: int,
    end_layer: int,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> tuple[Shard, int]:
    """The shard and the bytes read from its files. Raises ModelError for files that do not fit the config."""
    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
    shard = Shard(config, start_layer, end_layer, dtype, device)
    weights = Weights(paths)
    try:
        _fill(shard, weights, progress)
        shard.release_others()
        return shard, weights.num_bytes_read
    finally:
        weights.close()


def _fill(shard: Shard, weights: Weights, progress: Progress) -> None:
    shapes = dict(shard.parameter_shapes())
    stored_as = {name: _stored_name(name, weights) for name in shapes}
    total_bytes = sum(weights.place(name).size_bytes for name in sorted(set(stored_as.values())))
    done_bytes = 0
    loaded: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        stored = stored_as[name]
        if stored not in loaded:
            place = weights.place(stored)
            if place.shape != shape:
                raise ModelError(f"{place.path}: {stored} has shape {place.shape}, the config says {shape}")
            tensor = _read(place, weights, shard.config).to(dtype=shard.dtype, device=shard.device, copy=True)
            done_bytes += place.size_bytes
            # Only the embedding can be asked for twice, as the head.
            loaded = {EMBEDDING: tensor} if stored == EMBEDDING else loaded
            progress(done_bytes, total_bytes)
        else:
            tensor = loaded[stored]
        shard.set_parameter(name, tensor)


def _stored_name(name: str, weights: Weights) -> str:
    """A head that is tied to the embedding has no tensor of its own."""
    return EMBEDDING if name == HEAD and HEAD not in weights.tensors else name


def _read(place: TensorPlace, weights: Weights, config: PreTrainedConfig) -> Tensor:
    raw = np.frombuffer(weights.read(place.name), dtype=np.uint8)
    if weights.gguf_architecture is not None:
        values = _dequantize(raw, place)
        return torch.from_numpy(_undo(values, place.name, weights.gguf_architecture, config))
    if place.encoding not in _SAFETENSORS_DTYPES:
        supported = ", ".join(_SAFETENSORS_DTYPES)
        raise ModelError(f"{place.path}: {place.name} is stored as {place.encoding} (supported: {supported})")
    # A copy: torch does not take read-only memory without a warning.
    return torch.from_numpy(raw.copy()).view(_SAFETENSORS_DTYPES[place.encoding]).reshape(place.shape)


def _dequantize(raw: np.ndarray, place: TensorPlace) -> np.ndarray:
    try:
        values = gguf.quants.dequantize(
            raw.reshape(*place.shape[:-1], -1), gguf.GGMLQuantizationType[place.encoding]
        )
    except NotImplementedError as error:
        raise ModelError(
            f"{place.path}: quantization {place.encoding} of {place.name} is not supported"
        ) from error
    return np.array(values, dtype=np.float32).reshape(place.shape)


def _undo(values: np.ndarray, name: str, architecture: str, config: PreTrainedConfig) -> np.ndarray:
    if architecture == "llama" and ".self_attn.q_proj." in name:
        return _unpermute(values, config.num_attention_heads)
    if architecture == "llama" and ".self_attn.k_proj." in name:
        return _unpermute(values, config.num_key_value_heads)
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return values - 1
    return values


def _unpermute(values: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp interleaves the two halves of each head's rotary dimensions; transformers has them apart."""
    rest = values.shape[1:]
    paired = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *rest)
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(values.shape)
