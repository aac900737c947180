"""What Prometheus reads: the gateway's own counters and, at scrape time, the dashboard's figures.

Every app has a registry of its own; the node may register further collectors in it. Labels are bounded:
route templates, statuses, deployed models, members.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from node.gateway.backend import Backend, StageSeconds

SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class GatewayMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._requests = Counter(
            "pod_http_requests", "HTTP requests answered", ["route", "status"], registry=registry
        )
        self._duration = Histogram(
            "pod_http_request_seconds",
            "Time to the last byte",
            ["route"],
            registry=registry,
            buckets=SECONDS_BUCKETS,
        )
        self._first_token = Histogram(
            "pod_first_token_seconds",
            "Time to the first streamed text",
            registry=registry,
            buckets=SECONDS_BUCKETS,
        )
        self._prompt_tokens = Counter("pod_prompt_tokens", "Prompt tokens", ["model"], registry=registry)
        self._output_tokens = Counter("pod_output_tokens", "Tokens delivered", ["model"], registry=registry)

    def count_request(self, route: str, status: int, duration_s: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._duration.labels(route).observe(duration_s)

    def observe_first_token(self, duration_s: float) -> None:
        self._first_token.observe(duration_s)

    def count_tokens(self, model: str, num_prompt_tokens: int, num_output_tokens: int) -> None:
        self._prompt_tokens.labels(model).inc(num_prompt_tokens)
        self._output_tokens.labels(model).inc(num_output_tokens)


class PodCollector(Collector):
    """The figures of the dashboard, so that both always say the same."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing is read before the first scrape: the node may not be up when the app is made."""
        return []

    def collect(self) -> Iterator[Metric]:
        view = self._backend.dashboard()
        balances = GaugeMetricFamily("pod_balance_microcredits", "Balance of an account", labels=["account"])
        for row in view.members:
            balances.add_metric([row.name], row.balance_microcredits)
        balances.add_metric(["treasury"], view.treasury_microcredits)
        balances.add_metric(["issuance"], view.issuance_microcredits)
        yield balances
        served = GaugeMetricFamily("pod_served_tokens", "Tokens a member served", labels=["account"])
        consumed = GaugeMetricFamily("pod_consumed_tokens", "Tokens a member consumed", labels=["account"])
        for row in view.members:
            served.add_metric([row.name], row.num_served_tokens)
            consumed.add_metric([row.name], row.num_consumed_tokens)
        yield served
        yield consumed
        yield GaugeMetricFamily(
            "pod_books_sum_microcredits", "0 when the books balance", view.sum_microcredits
        )
        num_live = sum(row.live for row in view.nodes)
        yield GaugeMetricFamily("pod_nodes_live", "Nodes heard of lately", num_live)
        yield GaugeMetricFamily("pod_nodes", "Nodes in the roster", len(view.nodes))
        yield GaugeMetricFamily("pod_ledger_entries", "Entries held by this node", view.ledger.num_entries)
        yield from _stage_seconds(view.stage_seconds)


def _stage_seconds(rows: Sequence[StageSeconds]) -> Iterator[Metric]:
    """Of this node's requests, counted in steps; the rows are bounded where they are kept."""
    parts = {
        "compute": ("Time that steps took at a stage", [row.compute_s for row in rows]),
        "queue": ("Time that steps waited at a stage", [row.queue_s for row in rows]),
        "hop": ("Way from a stage to the next", [row.hop_s for row in rows]),
    }
    for part, (what, seconds) in parts.items():
        family = SummaryMetricFamily(f"pod_stage_{part}_seconds", what, labels=["model", "node"])
        for row, sum_s in zip(rows, seconds, strict=True):
            family.add_metric([row.model_name, row.node_name], count_value=row.num_steps, sum_value=sum_s)
        yield family
