"""Where the time of recent requests went: stage by stage, and what is left for head and links.

Only numbers, nodes and layers are kept, of the last requests and, as sums for the metrics, of all; nothing of
what was asked or answered. It knows neither clock nor links.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from node.links.frames import Stage, StageTiming
from node.sessions.session import HeadSession

MAX_NUM_RECENT = 64
MAX_NUM_ADDED = 16
MAX_NUM_SUMS = 256
# What a stage claims beyond this is no time but a mistake or a lie.
MAX_STAGE_US = 24 * 3600 * 1_000_000


@dataclass(frozen=True, slots=True)
class StageTime:
    """Microseconds of one request at one stage; `hop_us`: its way to the next one, all passes together."""

    node: bytes
    start_layer: int
    end_layer: int
    num_steps: int
    compute_us: int
    queue_us: int
    hop_us: int
    link_us: int

    @property
    def total_us(self) -> int:
        return self.compute_us + self.queue_us + self.hop_us


@dataclass(frozen=True, slots=True)
class RequestTime:
    """`total_us` from the start of the stages to the last token, the prompt included.

    `stages` is empty when some stage did not say, or when the request took more than one attempt.
    """

    time_ms: int
    model: bytes
    num_prompt_tokens: int
    num_output_tokens: int
    total_us: int
    tokens_per_s: float
    stages: tuple[StageTime, ...] = ()

    @property
    def route(self) -> tuple[tuple[bytes, int, int], ...]:
        return tuple((stage.node, stage.start_layer, stage.end_layer) for stage in self.stages)


@dataclass(slots=True)
class StageSum:
    """Over all requests since the node started."""

    num_steps: int = 0
    compute_us: int = 0
    queue_us: int = 0
    hop_us: int = 0

    def add(self, stage: StageTime | StageSum) -> None:
        self.num_steps += stage.num_steps
        self.compute_us += stage.compute_us
        self.queue_us += stage.queue_us
        self.hop_us += stage.hop_us


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Of the last requests over one route, added up; by `num_output_tokens` for the time of a token."""

    num_requests: int
    num_output_tokens: int
    total_us: int
    stages: tuple[StageTime, ...]

    @property
    def rest_us(self) -> int:
        """Head, links beyond their pings, and the waiting of stages for each other."""
        return max(0, self.total_us - sum(stage.total_us for stage in self.stages))


@dataclass
class Timings:
    """Newest last. `sums` by (model, node); of more pairs than fit, the rest are not counted."""

    recent: deque[RequestTime] = field(default_factory=lambda: deque(maxlen=MAX_NUM_RECENT))
    sums: dict[tuple[bytes, bytes], StageSum] = field(default_factory=dict)

    def add(self, request: RequestTime) -> None:
        self.recent.append(request)
        for stage in request.stages:
            key = request.model, stage.node
            if key in self.sums or len(self.sums) < MAX_NUM_SUMS:
                self.sums.setdefault(key, StageSum()).add(stage)

    def tokens_per_s(self, model: bytes) -> float | None:
        """Median decode speed of one stream; None before there was a request of two tokens."""
        speeds = [request.tokens_per_s for request in self.recent if request.model == model]
        return statistics.median(speeds) if speeds else None

    def breakdown(self, model: bytes) -> Breakdown | None:
        """None before a request told where its time went."""
        told = [request for request in self.recent if request.model == model and request.stages]
        same = [request for request in told if request.route == told[-1].route][-MAX_NUM_ADDED:]
        if not same:
            return None
        return Breakdown(
            len(same),
            sum(request.num_output_tokens for request in same),
            sum(request.total_us for request in same),
            tuple(_added(stages) for stages in zip(*(request.stages for request in same), strict=True)),
        )

    def links_us(self) -> dict[tuple[bytes, bytes], int]:
        """One way from a node to the next of a route: the shortest of what was measured lately."""
        found: dict[tuple[bytes, bytes], int] = {}
        for request in self.recent:
            nodes = [stage.node for stage in request.stages]
            for stage, following in zip(request.stages, [*nodes[1:], *nodes[:1]], strict=True):
                if stage.link_us:
                    hop = stage.node, following
                    found[hop] = min(stage.link_us, found.get(hop, stage.link_us))
        return found


def time_of(session: HeadSession, time_ms: int) -> RequestTime | None:
    """Of a session that ended; None when it gave too few tokens to tell anything."""
    speed, last_token_s = session.tokens_per_s, session.last_token_s
    if speed is None or last_token_s is None:
        return None
    terms = session.terms
    return RequestTime(
        time_ms=time_ms,
        model=terms.model,
        num_prompt_tokens=len(terms.prompt_ids),
        num_output_tokens=len(session.token_ids),
        total_us=max(1, round((last_token_s - session.began_s) * 1e6)),
        tokens_per_s=speed,
        stages=_stages(terms.route, session.timings) if session.num_attempts == 1 else (),
    )


def _stages(route: tuple[Stage, ...], timings: Mapping[int, StageTiming]) -> tuple[StageTime, ...]:
    """Empty unless every stage has told something that can be."""
    stages = [_stage(stage, timings.get(index)) for index, stage in enumerate(route)]
    return tuple(stage for stage in stages if stage) if all(stages) else ()


def _stage(stage: Stage, timing: StageTiming | None) -> StageTime | None:
    if timing is None:
        return None
    hop_us = timing.link_us * timing.num_steps
    if not max(timing.compute_us, timing.queue_us, hop_us) <= MAX_STAGE_US:
        return None
    return StageTime(
        stage.node,
        stage.start_layer,
        stage.end_layer,
        timing.num_steps,
        timing.compute_us,
        timing.queue_us,
        hop_us,
        timing.link_us,
    )


def _added(stages: Sequence[StageTime]) -> StageTime:
    """One stage of several requests."""
    return replace(
        stages[-1],
        num_steps=sum(stage.num_steps for stage in stages),
        compute_us=sum(stage.compute_us for stage in stages),
        queue_us=sum(stage.queue_us for stage in stages),
        hop_us=sum(stage.hop_us for stage in stages),
    )
