"""A shard of transformers' modules with its weights, without cache and engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from node.engine.loader import Progress, fill, read_config
from node.engine.shard import Shard
from node.models.manifest import Manifest


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
    """The shard, and the bytes read from its files."""
    config = read_config(manifest, model_dir)
    shard = Shard(config, start_layer, end_layer, dtype, device)
    num_bytes = fill(shard, config, manifest.name, paths, None, progress, max_num_bytes)
    shard.release_others()
    return shard, num_bytes
