"""A shard that is ready to serve: its layers, its KV cache, and how fast they were measured to be."""

from __future__ import annotations

from dataclasses import dataclass

from node.engine.kv_cache import KvCache
from node.engine.runner import Runner
from node.models.manifest import Manifest
from node.speed import Speed


@dataclass(frozen=True, slots=True)
class LoadedShard:
    model: bytes
    manifest: Manifest
    shard: Runner
    cache: KvCache
    num_weight_bytes: int
    num_kv_bytes: int
    speed: Speed

    @property
    def start_layer(self) -> int:
        return self.shard.start_layer

    @property
    def end_layer(self) -> int:
        return self.shard.end_layer

    def covers(self, model: bytes, start_layer: int, end_layer: int) -> bool:
        return self.model == model and self.start_layer <= start_layer and end_layer <= self.end_layer
