"""What this node knows of the pod right now: roster, adverts, liveness, routes. Reads only; changes nothing.

The one place that gateway, dashboard, placement and command line ask, so that they say the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from node.catalogue import Catalogue, Entry
from node.gateway.backend import NoRoute as GatewayNoRoute
from node.links.frames import Stage
from node.placement.explain import explain
from node.placement.route import NoRoute, route, route_text
from node.placement.view import View
from node.plan_book import PlanBook
from node.pod_view import build_view
from node.status import NodeStatus, StatusError
from pod.roster.roster import Roster

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelCondition:
    """`state` is ready, loading or not covered; `route` is set when it is ready."""

    state: str
    loaded_per_mille: int
    reason: str
    route: tuple[Stage, ...] = ()


class PodState:
    def __init__(
        self,
        *,
        node: bytes,
        roster: Callable[[], Roster],
        adverts: Callable[[], Mapping[bytes, bytes]],
        live: Callable[[], frozenset[bytes]],
        catalogue: Catalogue,
    ) -> None:
        self._node = node
        self._roster = roster
        self._adverts = adverts
        self._live = live
        self._catalogue = catalogue
        self._decoded: dict[bytes, tuple[bytes, NodeStatus]] = {}
        self.plan_book: PlanBook | None = None

    @property
    def roster(self) -> Roster:
        return self._roster()

    def live(self) -> frozenset[bytes]:
        """Nodes heard from lately, this one included."""
        return self._live() | {self._node}

    def statuses(self) -> Mapping[bytes, NodeStatus]:
        """What each node last said of itself. Unreadable adverts (of other versions) are left out."""
        found: dict[bytes, NodeStatus] = {}
        for node, body in self._adverts().items():
            known = self._decoded.get(node)
            if known is None or known[0] != body:
                try:
                    known = (body, NodeStatus.decode(body))
                except StatusError as error:
                    log.debug("advert of %s: %s", node.hex()[:8], error)
                    continue
                self._decoded[node] = known
            found[node] = known[1]
        return found

    def view(self, live: frozenset[bytes] | None = None) -> View:
        """What placement and routing decide on; `live` defaults to the nodes heard from lately."""
        return build_view(
            self.roster,
            self.statuses(),
            self.live() if live is None else live,
            self._catalogue.entries(),
        )

    def find_route(self, model: bytes, avoided: frozenset[bytes]) -> tuple[Stage, ...]:
        """The cheapest live route, this machine's own shards first. Raises the gateway's NoRoute."""
        try:
            return route(self.view(self.live() - avoided), model, prefer_node=self._node)
        except NoRoute as error:
            raise GatewayNoRoute(error.reason) from None

    def route_of(self, model: bytes) -> tuple[Stage, ...] | None:
        try:
            return route(self.view(), model, prefer_node=self._node)
        except NoRoute:
            return None

    def route_text(self, stages: tuple[Stage, ...]) -> str:
        return route_text(stages, {node.id: node.name for node in self.roster.nodes.values()})

    def condition_of(self, entry: Entry) -> ModelCondition:
        view, model = self.view(), entry.deployed.id
        try:
            return ModelCondition("ready", 1000, "", route(view, model, prefer_node=self._node))
        except NoRoute as error:
            reason = error.reason
        layers = [0] * entry.manifest.num_layers
        live = self.live()
        for node, status in self.statuses().items():
            for shard in status.shards if node in live else ():
                if shard.model == model:
                    for layer in range(shard.start_layer, min(shard.end_layer, len(layers))):
                        layers[layer] = max(layers[layer], shard.loaded_per_mille)
        state = "loading" if all(layers) else "not covered"
        return ModelCondition(state, sum(layers) // len(layers), self._why_not(view, entry) or reason)

    def _why_not(self, view: View, entry: Entry) -> str:
        plan = self.plan_book.plan if self.plan_book is not None else None
        remarks = explain(view, plan).models
        return next((remark.reason for remark in remarks if remark.model == entry.deployed.id), "")

    def note_of(self, node: bytes) -> str:
        """Why a node serves nothing, in a line; "" when there is nothing to say."""
        status = self.statuses().get(node)
        if status is None:
            return "has not been heard from yet"
        if not status.serving:
            return "uses the pod without serving"
        if status.problems:
            return "; ".join(reason for _, reason in status.problems)
        plan = self.plan_book.plan if self.plan_book is not None else None
        remarks = explain(self.view(), plan).nodes
        return "; ".join(remark.reason for remark in remarks if remark.node == node)
