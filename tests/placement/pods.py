"""Views from a few words, for the tests of placement: nodes and models in GiB and GiB/s."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from node.placement.assignment import Plan
from node.placement.plan import plan
from node.placement.view import DeployedModel, LoadedShard, NodeCapacity, View
from node.speed import DECODE_ROWS, NO_HEAD, PREFILL_ROWS, Speed

GIB = 1024**3
MIB = 1024**2
AUTHOR = bytes(32)


def id_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def make_node(
    name: str,
    memory_gib: float = 8,
    gib_per_second: float = 10,
    *,
    live: bool = True,
    serving: bool = True,
    rtt_us: int = 200,
    shards: Iterable[LoadedShard] = (),
    models: Iterable[str] | None = None,
    speeds: Mapping[str, Speed] | None = None,
) -> NodeCapacity:
    return NodeCapacity(
        node=id_of(name),
        name=name,
        live=live,
        serving=serving,
        memory_bytes=int(memory_gib * GIB),
        bytes_per_second=int(gib_per_second * GIB),
        data_address=f"{name}.test:7000",
        link_rtt_us=rtt_us,
        shards=tuple(shards),
        models_available=None if models is None else frozenset(id_of(model) for model in models),
        speeds=tuple((id_of(model), speed) for model, speed in (speeds or {}).items()),
    )


def make_speed(layer_us: int, head_us: int = 0) -> Speed:
    """Each further row costs a tenth of the first."""
    rows = [10 + size - 1 for size in DECODE_ROWS]
    head = tuple(head_us * num // 10 for num in rows) if head_us else NO_HEAD
    prefill = tuple(max(1, size * layer_us // 10) for size in PREFILL_ROWS)
    return Speed(tuple(layer_us * num // 10 for num in rows), prefill, head)


def make_model(
    name: str = "m", num_layers: int = 30, layer_mib: int = 100, split: int = 1, **sizes: int
) -> DeployedModel:
    return DeployedModel(
        model=id_of(name),
        name=name,
        layer_bytes=(layer_mib * MIB,) * num_layers,
        embedding_bytes=sizes.get("embedding_mib", 0) * MIB,
        head_bytes=sizes.get("head_mib", 0) * MIB,
        kv_bytes_per_token_per_layer=sizes.get("kv_bytes", 0),
        max_context_tokens=sizes.get("context", 2048),
        split=split,
    )


def make_shard(
    start: int,
    end: int,
    *,
    model: str = "m",
    ready: bool = True,
    num_active: int = 0,
    seconds_per_layer: float = 0.001,
    free_kv_tokens: int = 4096,
) -> LoadedShard:
    return LoadedShard(id_of(model), start, end, ready, num_active, seconds_per_layer, free_kv_tokens)


def make_view(nodes: Iterable[NodeCapacity], *models: DeployedModel) -> View:
    return View(tuple(nodes), models)


def first_plan(view: View) -> Plan:
    made = plan(view, None, AUTHOR)
    assert made is not None
    return made


def ranges(view: View, made: Plan | None, model: str = "m") -> dict[str, tuple[int, int]]:
    """Who holds what, by name, in the order of the layers."""
    names = {node.node: node.name for node in view.nodes}
    row = made.of_model(id_of(model)) if made else ()
    return {names[a.node]: (a.start_layer, a.end_layer) for a in row}


def is_cover(model: DeployedModel, made: Plan) -> bool:
    row = made.of_model(model.model)
    edges = [0, *(a.end_layer for a in row)]
    return edges == [*(a.start_layer for a in row), model.num_layers]
