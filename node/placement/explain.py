"""Why things are as they are: what a model lacks, and why a node holds nothing of a model.

Computed from a view and the plan in force, on any node, whenever somebody asks; nothing of it travels. It
changes nothing and decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from node.placement.assignment import Assignment, Plan
from node.placement.choice import GAIN_PERCENT
from node.placement.cuts import NS_PER_SECOND, Load, Prediction, Seat, balance, predict
from node.placement.ground import Ground
from node.placement.view import MEMORY_SHARE_PERCENT, DeployedModel, NodeCapacity, View

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class ModelRemark:
    """What a model lacks. If `is_covered`, all layers are given to live nodes: only its split is not met."""

    model: bytes
    is_covered: bool
    reason: str
    num_missing_bytes: int = 0


@dataclass(frozen=True, slots=True)
class NodeRemark:
    """Why `node` holds nothing of `model`."""

    node: bytes
    model: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Explanation:
    models: tuple[ModelRemark, ...]
    nodes: tuple[NodeRemark, ...]


def explain(view: View, plan: Plan | None) -> Explanation:
    ground = Ground.of(view, plan)
    return Explanation(
        tuple(remark for model in ground.models if (remark := _model_remark(ground, model))),
        tuple(remark for model in ground.models for remark in _node_remarks(ground, model)),
    )


def predicted_tokens_per_second(view: View, plan: Plan, model: bytes) -> float | None:
    """One stream's decode speed as the plan cuts the model; None while it is not covered."""
    ground = Ground.of(view, plan)
    prediction = _prediction(ground, model)
    return NS_PER_SECOND / prediction.token_ns if prediction else None


def _prediction(ground: Ground, model: bytes) -> Prediction | None:
    if model not in ground.loads or not ground.is_covered(model):
        return None
    by_node = {seat.node: seat for seat in ground.seats(model)}
    return predict(ground.loads[model], by_node, ground.layout[model])


def _model_remark(ground: Ground, model: DeployedModel) -> ModelRemark | None:
    if ground.is_covered(model.model):
        num_stages = len(ground.layout[model.model])
        if num_stages >= min(model.split, model.num_layers):
            return None
        wish = f"{num_stages} of the {model.split} stages asked for"
        reason = f"{model.name} is cut into {wish}: no more nodes can take one"
        return ModelRemark(model.model, True, reason)
    if not any(node.can_hold(model.model) for node in ground.nodes):
        return ModelRemark(model.model, False, f"no live node that serves has the files of {model.name}")
    num_missing_bytes = _num_missing_bytes(ground, model.model)
    reason = f"no room for {model.name}: {_gib(num_missing_bytes)} of memory are missing"
    lost = _lost_nodes(ground, model.model)
    if lost:
        reason += f"; part of it was on {', '.join(lost)}, which cannot serve it now"
    return ModelRemark(model.model, False, reason, num_missing_bytes)


def _num_missing_bytes(ground: Ground, model: bytes) -> int:
    """The memory a further node must offer (its headroom included) to take what the others leave over."""
    ground = ground.without_row(model)
    load = ground.loads[model]
    start = 0
    for seat in sorted(ground.seats(model), key=lambda seat: -seat.free_bytes):
        start = load.furthest(start, seat.free_bytes, load.read_bytes(0, load.num_layers))
    rest = min(start, load.num_layers - 1)
    return -(-load.memory_bytes(rest, load.num_layers) * 100 // MEMORY_SHARE_PERCENT)


def _lost_nodes(ground: Ground, model: bytes) -> list[str]:
    able = {node.node for node in ground.nodes if node.can_hold(model)}
    names = {node.node: node.name for node in ground.nodes}
    row = ground.layout.get(model, ())
    return [names.get(a.node, a.node.hex()[:8]) for a in row if a.node not in able]


def _node_remarks(ground: Ground, model: DeployedModel) -> list[NodeRemark]:
    seats = {seat.node: seat for seat in ground.seats(model.model)}
    holders = {assignment.node for assignment in ground.layout.get(model.model, ())}
    free_bytes, now = ground.free_bytes(model.model), _prediction(ground, model.model)
    return [
        NodeRemark(node.node, model.model, _why_not(ground, model, node, seats, free_bytes[node.node], now))
        for node in ground.nodes
        if node.node not in holders
    ]


def _why_not(
    ground: Ground,
    model: DeployedModel,
    node: NodeCapacity,
    seats: dict[bytes, Seat],
    free_bytes: int,
    now: Prediction | None,
) -> str:
    if not node.live:
        return f"{node.name} is not reachable"
    if not node.serving:
        return f"{node.name} does not serve"
    if not node.has_files(model.model):
        return f"{node.name} does not have the files of {model.name}"
    if node.node not in seats:
        free = _gib(max(0, free_bytes))
        return f"{node.name} has no room for a layer of {model.name}: {free} are free"
    if now is None:
        return f"{model.name} does not fit the pod, even with {node.name}"
    return _why_not_faster(
        ground.loads[model.model], model.name, node, seats, ground.layout[model.model], now
    )


def _why_not_faster(
    load: Load,
    name: str,
    node: NodeCapacity,
    seats: dict[bytes, Seat],
    row: Sequence[Assignment],
    now: Prediction,
) -> str:
    """Compare with the node alone, and with one more stage on it: whichever would be faster."""
    alone = balance(load, [seats[node.node]])
    joined = balance(load, [*(seats[a.node] for a in row), seats[node.node]])
    times_ns = [predict(load, seats, tried).token_ns for tried in (alone, joined) if tried]
    speeds = f"{_speed(min(times_ns))} tokens/s with it, {_speed(now.token_ns)} without" if times_ns else ""
    if times_ns and min(times_ns) > now.token_ns:
        return f"{node.name} would slow {name} down: {speeds}"
    if times_ns:
        return f"{node.name} would not make {name} more than {GAIN_PERCENT} % faster: {speeds}"
    return f"{node.name} is not needed for {name}"


def _gib(num_bytes: int) -> str:
    """Rounded up, so that what is missing never reads as nothing."""
    return f"{-(-num_bytes * 100 // GIB) / 100:.2f} GiB"


def _speed(token_ns: int) -> str:
    return f"{NS_PER_SECOND / max(1, token_ns):.1f}"
