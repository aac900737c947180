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
from node.models.bundle import check_config
from node.models.errors import ModelError
from node.models.manifest import Manifest
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
    manifest: Manifest,
    model_dir: Path,
    paths: Sequence[Path],
    start_layer: int,
    end_layer: int,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    max_num_bytes: int | None = None,
) -> tuple[Shard, int]:
    """The shard and the bytes read from its files. Raises ModelError for files that do not fit the config,
    a config that is not the manifest's, and parameters that need more memory than `max_num_bytes`.
    """
    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
    check_config(config, model_dir)
    _check_is_of(manifest, config, model_dir)
    shard = Shard(config, start_layer, end_layer, dtype, device)
    weights = Weights(paths)
    try:
        check_room(manifest, shard.num_weight_bytes, max_num_bytes)
        _fill(shard, weights, progress)
        shard.release_others()
        return shard, weights.num_bytes_read
    finally:
        weights.close()


def check_room(manifest: Manifest, num_bytes: int, max_num_bytes: int | None) -> None:
    if max_num_bytes is not None and num_bytes > max_num_bytes:
        raise ModelError(
            f"{manifest.name}: these layers need {_mib(num_bytes)} of memory, {_mib(max_num_bytes)} are "
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
