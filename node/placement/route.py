"""The cheapest live route for a session: stages over ready shards that cover all layers, without a gap.

The cost of a stage is layers x what one was measured to take with the sessions already there (where that is
not known, seconds per layer x (1 + sessions)), and the head's at the last stage; of a hop the way between the
two nodes if it was measured, else half the round trip of the slower of both links. A route visits a node at
most once (an engine tells sessions apart by their id alone). It uses what is loaded, whatever the plan says,
and does not know how busy a link is.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from node.links.frames import Stage
from node.placement.cuts import NS_PER_SECOND
from node.placement.view import LoadedShard, NodeCapacity, View

MAX_NUM_PARTIAL_ROUTES = 20_000
"""Only shards that overlap in a way no plan makes come near it."""

Cost = tuple[int, int, int]
"""Nanoseconds; at equal time layers that are not on the preferred node, then stages."""

FREE: Cost = (0, 0, 0)


class NoRoute(Exception):
    """No route now. `missing` are the layer ranges no usable shard holds, empty if the reason is another."""

    def __init__(self, reason: str, missing: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.missing = missing


@dataclass(frozen=True, slots=True)
class _Terms:
    """What a session asks of its stages."""

    model: bytes
    prefer_node: bytes | None
    num_kv_tokens: int
    avoid: frozenset[bytes]

    def obstacle(self, node: NodeCapacity, shard: LoadedShard) -> str | None:
        """Why this shard can't be a stage now; None if it can."""
        if not node.live:
            return f"{node.name} is not reachable"
        if not node.serving:
            return f"{node.name} does not serve"
        if node.node in self.avoid:
            return f"{node.name} just failed"
        if not shard.ready:
            return f"{node.name} is still loading"
        if shard.free_kv_tokens < self.num_kv_tokens:
            return (
                f"{node.name} has KV room for {shard.free_kv_tokens} tokens, {self.num_kv_tokens} are needed"
            )
        return None


@dataclass(frozen=True, slots=True, eq=False)
class _Offer:
    """A ready shard with the node it is on."""

    node: NodeCapacity
    shard: LoadedShard
    ns_per_layer: int
    head_ns: int
    is_preferred: bool

    def covers(self, start: int, end: int) -> bool:
        return self.shard.start_layer <= start and end <= self.shard.end_layer

    def cost(self, num_layers: int, is_last: bool) -> Cost:
        ns = num_layers * self.ns_per_layer + (self.head_ns if is_last else 0)
        return ns, 0 if self.is_preferred else num_layers, 0


def route(
    view: View,
    model: bytes,
    prefer_node: bytes | None = None,
    num_kv_tokens: int = 0,
    avoid: frozenset[bytes] = frozenset(),
) -> tuple[Stage, ...]:
    """The stages of the cheapest route with KV room for `num_kv_tokens` at each; raises NoRoute.

    `avoid` are nodes that the caller just saw failing.
    """
    deployed = view.find_model(model)
    if deployed is None:
        raise NoRoute("the pod does not serve this model")
    terms = _Terms(model, prefer_node, num_kv_tokens, avoid)
    offers = _offers(view, terms)
    missing = _missing(deployed.num_layers, [offer.shard for offer in offers])
    if missing:
        raise NoRoute(_reason(view, deployed.name, missing, terms), missing)
    return _Search(view, deployed.num_layers, offers).cheapest(deployed.name)


def route_text(stages: Sequence[Stage], names: Mapping[bytes, str]) -> str:
    """`name[0:10),name[10:20)`: as people and the header `x-pod-route` see it."""
    return ",".join(
        f"{names.get(stage.node, stage.node.hex()[:8])}[{stage.start_layer}:{stage.end_layer})"
        for stage in stages
    )


def _offers(view: View, terms: _Terms) -> list[_Offer]:
    """In an order that does not depend on the order of the view."""
    offers = [
        _Offer(node, shard, layer_ns(node, shard), head_ns(node, shard), node.node == terms.prefer_node)
        for node in view.nodes
        for shard in node.shards
        if shard.model == terms.model and terms.obstacle(node, shard) is None
    ]
    return sorted(offers, key=lambda o: (o.shard.start_layer, o.shard.end_layer, o.node.node, o.ns_per_layer))


def layer_ns(node: NodeCapacity, shard: LoadedShard) -> int:
    """One layer for one more session."""
    speed = node.speed_of(shard.model)
    if speed is not None:
        return speed.layer_ns(1 + shard.num_active)
    return round(shard.seconds_per_layer * NS_PER_SECOND) * (1 + shard.num_active)


def head_ns(node: NodeCapacity, shard: LoadedShard) -> int:
    """Final norm and head, 0 if that was not measured."""
    speed = node.speed_of(shard.model)
    return speed.head_ns(1 + shard.num_active) if speed is not None else 0


class _Search:
    """A* over partial routes.

    What is still to come is estimated by the cheapest way that may visit nodes twice, so the search walks
    straight to the goal unless the cheapest way does.
    """

    def __init__(self, view: View, num_layers: int, offers: list[_Offer]) -> None:
        self.view = view
        ends = {end for o in offers for end in (o.shard.start_layer, min(o.shard.end_layer, num_layers))}
        # The last layer is set apart, for the head's time comes with it.
        cuts = sorted({end for end in ends if end <= num_layers} | {num_layers - 1, 0})
        # Between two neighbouring cuts nothing changes, so the cheapest route changes stages at cuts only
        # (unless a node were worth a layer just to be passed through: measured ways can be that odd).
        self.intervals = list(pairwise(cuts))
        self.offers = offers
        self.covering = [
            [number for number, offer in enumerate(offers) if offer.covers(start, end)]
            for start, end in self.intervals
        ]
        self.to_go = self._costs_to_go()

    def cheapest(self, name: str) -> tuple[Stage, ...]:
        waiting: list[tuple[Cost, tuple[int, ...], Cost, frozenset[bytes]]] = []
        for number in self.covering[0]:
            spent = _add(self._interval_cost(0, number), (0, 0, 1))
            self._push(waiting, (number,), spent, frozenset())
        seen: set[tuple[int, int, frozenset[bytes]]] = set()
        while waiting and len(seen) < MAX_NUM_PARTIAL_ROUTES:
            _, path, spent, left = heapq.heappop(waiting)
            if len(path) == len(self.intervals):
                return self._stages(path)
            state = (len(path), path[-1], left)
            if state not in seen:
                seen.add(state)
                self._extend(waiting, path, spent, left)
        raise NoRoute(f"no route for {name}: its shards only join up in ways that visit a node twice")

    def _extend(
        self,
        waiting: list[tuple[Cost, tuple[int, ...], Cost, frozenset[bytes]]],
        path: tuple[int, ...],
        spent: Cost,
        left: frozenset[bytes],
    ) -> None:
        here, index = path[-1], len(path)
        node = self.offers[here].node.node
        for number in self.covering[index]:
            step = _add(spent, self._interval_cost(index, number))
            if number == here:
                self._push(waiting, (*path, number), step, left)
            elif self.offers[number].node.node not in left | {node}:
                hopped = _add(step, self._hop_cost(here, number))
                self._push(waiting, (*path, number), hopped, self._still_met(left | {node}, index))

    def _push(
        self,
        waiting: list[tuple[Cost, tuple[int, ...], Cost, frozenset[bytes]]],
        path: tuple[int, ...],
        spent: Cost,
        left: frozenset[bytes],
    ) -> None:
        estimate = _add(spent, self.to_go[len(path) - 1][path[-1]])
        heapq.heappush(waiting, (estimate, path, spent, left))

    def _still_met(self, left: frozenset[bytes], index: int) -> frozenset[bytes]:
        """Nodes that hold nothing further on need not be remembered; that keeps equal states equal."""
        start = self.intervals[index][0]
        ahead = {o.node.node for o in self.offers if o.shard.end_layer > start}
        return left & ahead

    def _costs_to_go(self) -> list[dict[int, Cost]]:
        """Per interval and offer: the cheapest way through all later intervals, ignoring visits."""
        to_go: list[dict[int, Cost]] = [dict.fromkeys(self.covering[-1], FREE)]
        for index in range(len(self.intervals) - 1, 0, -1):
            later = {
                number: _add(self._interval_cost(index, number), cost) for number, cost in to_go[-1].items()
            }
            to_go.append(
                {
                    here: min(
                        cost if number == here else _add(cost, self._hop_cost(here, number))
                        for number, cost in later.items()
                    )
                    for here in self.covering[index - 1]
                }
            )
        return to_go[::-1]

    def _interval_cost(self, index: int, number: int) -> Cost:
        start, end = self.intervals[index]
        return self.offers[number].cost(end - start, index == len(self.intervals) - 1)

    def _hop_cost(self, here: int, there: int) -> Cost:
        return self.view.hop_ns(self.offers[here].node, self.offers[there].node), 0, 1

    def _stages(self, path: tuple[int, ...]) -> tuple[Stage, ...]:
        stages: list[Stage] = []
        for (start, end), number in zip(self.intervals, path, strict=True):
            node = self.offers[number].node
            if stages and stages[-1].node == node.node:
                start = stages.pop().start_layer
            stages.append(Stage(node.node, node.data_address, start, end))
        return tuple(stages)


def _add(one: Cost, other: Cost) -> Cost:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def _missing(num_layers: int, shards: Iterable[LoadedShard]) -> tuple[tuple[int, int], ...]:
    missing: list[tuple[int, int]] = []
    covered_to = 0
    for start, end in sorted((shard.start_layer, shard.end_layer) for shard in shards):
        if covered_to < min(start, num_layers):
            missing.append((covered_to, min(start, num_layers)))
        covered_to = max(covered_to, end)
    if covered_to < num_layers:
        missing.append((covered_to, num_layers))
    return tuple(missing)


def _reason(view: View, name: str, missing: tuple[tuple[int, int], ...], terms: _Terms) -> str:
    ranges = " and ".join(f"[{start},{end})" for start, end in missing)
    causes = [
        obstacle
        for node in sorted(view.nodes, key=lambda node: (node.name, node.node))
        for shard in node.shards
        if shard.model == terms.model
        and any(shard.start_layer < end and start < shard.end_layer for start, end in missing)
        and (obstacle := terms.obstacle(node, shard))
    ]
    why = "; ".join(dict.fromkeys(causes)) or "no live node holds them"
    return f"no route for {name}: layers {ranges} are missing ({why})"
