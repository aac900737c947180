"""From a load order to a shard that is ready to serve: weights in, KV room set aside, its speed measured.

Called on a loading thread, while the engine goes on serving its other shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from node.engine.kv_cache import BLOCK_TOKENS, KvCache
from node.engine.loaded import LoadedShard
from node.engine.loader import Progress, fill, read_config
from node.engine.native.abi import Kernels
from node.engine.probe import measure
from node.engine.runner import make_runner
from node.models.errors import ModelError
from node.models.manifest import Manifest

MAX_NUM_FULL_CONTEXTS = 16


def provision(
    manifest: Manifest,
    model_dir: Path,
    paths: Sequence[Path],
    start_layer: int,
    end_layer: int,
    dtype: torch.dtype,
    device: torch.device,
    max_num_kv_bytes: int,
    progress: Progress,
    max_num_weight_bytes: int | None = None,
    max_num_bits: int | None = None,
    kernels: Kernels | None = None,
) -> LoadedShard:
    """Raises ModelError: damaged or foreign files, layers that are not there, no room for KV."""
    if not 0 <= start_layer < end_layer <= manifest.num_layers:
        layers = f"[{start_layer},{end_layer})"
        raise ModelError(f"{manifest.name} has {manifest.num_layers} layers, {layers} are not among them")
    config = read_config(manifest, model_dir)
    is_packed = max_num_bits is not None
    runner = make_runner(config, start_layer, end_layer, dtype, is_packed, device, kernels)
    block_bytes = _block_bytes(manifest, start_layer, end_layer, runner.cache_dtype)
    num_blocks = _num_blocks(manifest, block_bytes, max_num_kv_bytes)
    fill(runner, config, manifest.name, paths, max_num_bits, progress, max_num_weight_bytes)
    runner.release_others()
    cache = KvCache(
        start_layer,
        end_layer,
        num_blocks,
        manifest.num_kv_values_per_token_per_layer // (2 * runner.head_dim),
        runner.head_dim,
        runner.cache_dtype,
        device,
    )
    speed = measure(runner, cache, manifest.hidden_size, end_layer == manifest.num_layers)
    return LoadedShard(
        model=manifest.model_id,
        manifest=manifest,
        shard=runner,
        cache=cache,
        num_weight_bytes=runner.num_weight_bytes,
        num_kv_bytes=num_blocks * block_bytes,
        speed=speed,
    )


def _block_bytes(manifest: Manifest, start_layer: int, end_layer: int, dtype: torch.dtype) -> int:
    values = manifest.num_kv_values_per_token_per_layer * (end_layer - start_layer)
    return values * dtype.itemsize * BLOCK_TOKENS


def _num_blocks(manifest: Manifest, block_bytes: int, max_num_kv_bytes: int) -> int:
    """What fits, but no more than a few full contexts: the rest stays for other shards."""
    wanted = -(-manifest.max_context_tokens // BLOCK_TOKENS) * MAX_NUM_FULL_CONTEXTS
    num_blocks = min(wanted, max_num_kv_bytes // block_bytes)
    if num_blocks < 1:
        raise ModelError(
            f"{manifest.name}: no memory is left for the KV cache "
            f"(at least {block_bytes >> 10} KiB, {max(0, max_num_kv_bytes) >> 10} KiB are free)"
        )
    return num_blocks
