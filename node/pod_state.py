"""What this node knows of the pod right now: roster, adverts, liveness, routes. Reads only; changes nothing.

The one place that gateway, dashboard, placement and command line ask, so that they say the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median_low

from ledger.rate_card import RateCard
from node.catalogue import Catalogue, Entry
from node.gateway.backend import NoRoute as GatewayNoRoute
from node.links.frames import Stage
from node.placement.explain import Explanation, explain
from node.placement.plan import plan
from node.placement.predict import predicted_tokens_per_s
from node.placement.route import NoRoute, route, route_text
from node.placement.view import View
from node.plan_book import PlanBook
from node.pod_view import build_view, deployed_model
from node.policy import rate_card_of, recent_rate_cards
from node.sessions.timings import Timings
from node.status import MAX_RTT_US, NodeStatus, StatusError
from pod.roster.roster import Roster

log = logging.getLogger(__name__)

MIN_FAR_RTT_US = 5_000


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
        self._view: View | None = None
        self._explanation: Explanation | None = None
        self._routes: dict[bytes, tuple[Stage, ...] | NoRoute] = {}
        self.plan_book: PlanBook | None = None
        self.timings = Timings()
        # Nodes that signed two histories: no work goes to them.
        self.frozen: frozenset[bytes] = frozenset()

    def changed(self) -> None:
        """Roster, adverts, liveness, files or plan are others now: what was worked out from them is void."""
        self._view = None
        self._explanation = None
        self._routes.clear()

    @property
    def roster(self) -> Roster:
        return self._roster()

    def rate_card(self) -> RateCard:
        """The one in force: new requests are priced by it."""
        return rate_card_of(self.roster)

    def recent_rate_cards(self) -> tuple[RateCard, ...]:
        """Those that stages accept, the one in force last."""
        return recent_rate_cards(self.roster)

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

    def view(self) -> View:
        """What placement and routing decide on."""
        if self._view is None:
            self._view = self._build_view(self.live() - self.frozen)
        return self._view

    def _build_view(self, live: frozenset[bytes]) -> View:
        links_us = self.timings.links_us()
        return build_view(self.roster, self.statuses(), live, self._catalogue.entries(), links_us=links_us)

    def find_route(self, model: bytes, avoided: frozenset[bytes]) -> tuple[Stage, ...]:
        """The cheapest live route, this machine's own shards first. Raises the gateway's NoRoute."""
        try:
            if not avoided:
                return self._route(model)
            return route(self._build_view(self.live() - self.frozen - avoided), model, prefer_node=self._node)
        except NoRoute as error:
            raise GatewayNoRoute(error.reason) from None

    def _route(self, model: bytes) -> tuple[Stage, ...]:
        """Raises NoRoute."""
        if model not in self._routes:
            try:
                self._routes[model] = route(self.view(), model, prefer_node=self._node)
            except NoRoute as error:
                self._routes[model] = error
        found = self._routes[model]
        if isinstance(found, NoRoute):
            raise found
        return found

    def route_of(self, model: bytes) -> tuple[Stage, ...] | None:
        try:
            return self._route(model)
        except NoRoute:
            return None

    def num_kv_tokens(self, model: bytes) -> int | None:
        """KV room of the route's smallest stage: the longest session it can ever take. None: no route."""
        stages, statuses = self.route_of(model), self.statuses()
        if stages is None:
            return None
        return min(
            max(
                (
                    shard.num_kv_tokens
                    for shard in statuses[stage.node].shards
                    if shard.model == model
                    and shard.start_layer <= stage.start_layer
                    and stage.end_layer <= shard.end_layer
                ),
                default=0,
            )
            for stage in stages
        )

    def tokens_per_s(self, model: bytes) -> float | None:
        """Decode speed of this node's recent requests, one stream's; None if there was none."""
        return self.timings.tokens_per_s(model)

    def predicted_tokens_per_s(self, model: bytes, stages: tuple[Stage, ...]) -> float | None:
        """By what the nodes of the route measured; None if one has not."""
        return predicted_tokens_per_s(self.view(), model, stages) if stages else None

    def link_rtt_us(self) -> int:
        """From this node to next stages, as recent requests told; 0 if unknown or too short to matter.

        Under load even a ping on the same machine takes a millisecond.
        """
        ways_us = [way_us for (here, _), way_us in self.timings.links_us().items() if here == self._node]
        rtt_us = 2 * median_low(ways_us) if ways_us else 0
        return min(rtt_us, MAX_RTT_US) if rtt_us >= MIN_FAR_RTT_US else 0

    def route_text(self, stages: tuple[Stage, ...]) -> str:
        return route_text(stages, {node.id: node.name for node in self.roster.nodes.values()})

    def condition_of(self, entry: Entry) -> ModelCondition:
        model = entry.deployed.id
        try:
            return ModelCondition("ready", 1000, "", self._route(model))
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
        return ModelCondition(state, sum(layers) // len(layers), self._why_not(model) or reason)

    def _explain(self) -> Explanation:
        if self._explanation is None:
            self._explanation = explain(self.view(), self.plan_book.plan if self.plan_book else None)
        return self._explanation

    def _why_not(self, model: bytes) -> str:
        return next((remark.reason for remark in self._explain().models if remark.model == model), "")

    def num_missing_bytes(self, entry: Entry) -> int:
        """How much memory the nodes that serve now lack for one more model; 0 when none serves yet."""
        view = self.view()
        able = [node for node in view.nodes if node.live and node.serving]
        if not able:
            return 0
        # Whether they have its files is only known once they were told to look.
        model = entry.deployed.id
        nodes = tuple(
            replace(n, models_available=n.models_available and n.models_available | {model})
            for n in view.nodes
        )
        others = tuple(known for known in view.models if known.model != model)
        wished = View(nodes, (*others, replace(deployed_model(entry), split=1)))
        planned = plan(wished, self.plan_book.plan if self.plan_book else None, self._node)
        current = planned or (self.plan_book.plan if self.plan_book else None)
        remarks = explain(wished, current).models
        return next((remark.num_missing_bytes for remark in remarks if remark.model == model), 0)

    def note_of(self, node: bytes) -> str:
        """Why a node serves nothing, in a line; "" when there is nothing to say."""
        status = self.statuses().get(node)
        if status is None:
            return "has not been heard from yet"
        if not status.serving:
            return "uses the pod without serving"
        if status.problems:
            return "; ".join(reason for _, reason in status.problems)
        return "; ".join(remark.reason for remark in self._explain().nodes if remark.node == node)
