"""Roster, adverts and liveness -> the view that placement and routing decide on. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from node.catalogue import Entry
from node.placement.view import DeployedModel, LoadedShard, NodeCapacity, View
from node.status import NodeStatus
from pod.roster.roster import Roster


def build_view(
    roster: Roster,
    statuses: Mapping[bytes, NodeStatus],
    live: frozenset[bytes],
    models: Iterable[Entry],
    num_active: Mapping[tuple[bytes, bytes], int] | None = None,
    links_us: Mapping[tuple[bytes, bytes], int] | None = None,
) -> View:
    """Only roster nodes that have said what they offer. `num_active` counts sessions by (node, model).

    `links_us`: one way between two nodes, where it was measured.
    """
    active = num_active or {}
    return View(
        nodes=tuple(
            _capacity(node, roster.nodes[node].name, status, node in live, active)
            for node, status in sorted(statuses.items())
            if node in roster.nodes
        ),
        models=tuple(deployed_model(entry) for entry in models),
        links_us=links_us or {},
    )


def _capacity(
    node: bytes, name: str, status: NodeStatus, live: bool, active: Mapping[tuple[bytes, bytes], int]
) -> NodeCapacity:
    return NodeCapacity(
        node=node,
        name=name,
        live=live,
        serving=status.serving,
        memory_bytes=status.memory_bytes,
        bytes_per_second=max(1, status.bytes_per_second),
        data_address=status.data_address,
        shards=tuple(
            LoadedShard(
                model=shard.model,
                start_layer=shard.start_layer,
                end_layer=shard.end_layer,
                ready=shard.ready,
                num_active=active.get((node, shard.model), 0),
                seconds_per_layer=shard.microseconds_per_layer / 1e6,
                free_kv_tokens=shard.num_kv_tokens,
            )
            for shard in status.shards
        ),
        models_available=frozenset(status.models_available),
        link_rtt_us=status.link_rtt_us,
        speeds=status.speeds,
    )


def deployed_model(entry: Entry) -> DeployedModel:
    """What placement needs to know of a model."""
    manifest = entry.manifest
    return DeployedModel(
        model=entry.deployed.id,
        name=entry.deployed.name,
        layer_bytes=manifest.layer_num_bytes,
        embedding_bytes=manifest.embedding_num_bytes,
        head_bytes=manifest.head_num_bytes,
        kv_bytes_per_token_per_layer=manifest.kv_bytes_per_token_per_layer,
        max_context_tokens=manifest.max_context_tokens,
        split=max(1, entry.deployed.num_stages),
    )
