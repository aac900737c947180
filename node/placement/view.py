"""What placement and routing see: the nodes with what they offer and hold, and the models to serve.

A view is a value. Whoever builds it from signed adverts decides who is live; nothing here knows a clock or a
network. Every number is checked once, here, because adverts come from other machines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from node.speed import Speed

MEMORY_SHARE_PERCENT = 85
"""The share of a node's memory that weights and KV room may fill; the rest is headroom."""

MAX_NUM_KV_ROOM_TOKENS = 8192
"""KV room set aside per layer: one session of the model's whole context, but no more tokens than this."""

MIN_HOP_NS = 50_000
"""What a hop costs even on loopback (half of the measured round trip of 16 KB over TLS)."""


@dataclass(frozen=True, slots=True)
class LoadedShard:
    """The weights of `[start_layer, end_layer)` on a node: loaded when `ready`, on their way in when not."""

    model: bytes
    start_layer: int
    end_layer: int
    ready: bool
    num_active: int
    seconds_per_layer: float
    free_kv_tokens: int

    def __post_init__(self) -> None:
        if not 0 <= self.start_layer < self.end_layer:
            raise ValueError(f"a shard of layers [{self.start_layer},{self.end_layer}) holds nothing")
        if not math.isfinite(self.seconds_per_layer) or self.seconds_per_layer < 0:
            raise ValueError("seconds per layer must be a finite number, 0 or more")
        if self.num_active < 0 or self.free_kv_tokens < 0:
            raise ValueError("the counts of a shard must be 0 or more")


@dataclass(frozen=True, slots=True)
class NodeCapacity:
    """What a node offers. `memory_bytes` is all its engine may use, loaded shards included.

    `link_rtt_us` is its round trip to other nodes as it measures it; `models_available` the models whose
    files it has or can get, None for every model; `speeds` by model, of those it has held layers of.
    """

    node: bytes
    name: str
    live: bool
    serving: bool
    memory_bytes: int
    bytes_per_second: int
    data_address: str
    link_rtt_us: int = 0
    shards: tuple[LoadedShard, ...] = ()
    models_available: frozenset[bytes] | None = None
    speeds: tuple[tuple[bytes, Speed], ...] = ()

    def __post_init__(self) -> None:
        if self.memory_bytes < 0 or self.link_rtt_us < 0:
            raise ValueError("memory and round trip of a node must be 0 or more")
        if self.bytes_per_second <= 0:
            raise ValueError("a node's bytes per second must be more than 0")

    @property
    def budget_bytes(self) -> int:
        return self.memory_bytes * MEMORY_SHARE_PERCENT // 100

    @property
    def hop_ns(self) -> int:
        """One way over this node's link: half of its round trip."""
        return max(MIN_HOP_NS, self.link_rtt_us * 500)

    def speed_of(self, model: bytes) -> Speed | None:
        """As measured on real layers; None if it never held any."""
        return next((speed for known, speed in self.speeds if known == model), None)

    def has_files(self, model: bytes) -> bool:
        return self.models_available is None or model in self.models_available

    def can_hold(self, model: bytes) -> bool:
        return self.live and self.serving and self.has_files(model)


@dataclass(frozen=True, slots=True)
class DeployedModel:
    """A model to serve, in bytes of its loaded dtype. `split` asks for at least that many stages."""

    model: bytes
    name: str
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int
    kv_bytes_per_token_per_layer: int
    max_context_tokens: int
    split: int = 1

    def __post_init__(self) -> None:
        if not self.layer_bytes or min(self.layer_bytes) <= 0:
            raise ValueError(f"model {self.name} needs layers of more than 0 bytes")
        if min(self.embedding_bytes, self.head_bytes, self.kv_bytes_per_token_per_layer) < 0:
            raise ValueError(f"the sizes of model {self.name} must be 0 or more")

    @property
    def num_layers(self) -> int:
        return len(self.layer_bytes)

    @property
    def kv_room_bytes_per_layer(self) -> int:
        return self.kv_bytes_per_token_per_layer * min(self.max_context_tokens, MAX_NUM_KV_ROOM_TOKENS)


@dataclass(frozen=True, slots=True)
class View:
    """Nodes and models, in any order: the order never changes what is decided.

    `links_us`: one way from a node to another where that was measured; who looks has its own such knowledge,
    so plans, which must be the same everywhere, don't use it.
    """

    nodes: tuple[NodeCapacity, ...]
    models: tuple[DeployedModel, ...]
    links_us: Mapping[tuple[bytes, bytes], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len({node.node for node in self.nodes}) != len(self.nodes):
            raise ValueError("a view names each node once")
        if len({model.model for model in self.models}) != len(self.models):
            raise ValueError("a view names each model once")

    def hop_ns(self, here: NodeCapacity, there: NodeCapacity) -> int:
        """From one node to another: as measured, else by the slower of both links."""
        measured_us = self.links_us.get((here.node, there.node), 0)
        return max(MIN_HOP_NS, measured_us * 1000) if measured_us else max(here.hop_ns, there.hop_ns)

    def find_model(self, model: bytes) -> DeployedModel | None:
        return next((deployed for deployed in self.models if deployed.model == model), None)
