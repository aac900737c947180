"""What people and tools are shown of where time went: this head's recent requests, in names and numbers.

Reads the state; what is kept, and for how long, is `sessions/timings.py`'s business.
"""

from __future__ import annotations

from node.books_view import model_name, node_name
from node.gateway.backend import StageSeconds, TokenTime
from node.pod_state import PodState
from node.sessions.timings import StageSum, StageTime

Result = dict[str, object]

MAX_NUM_SHOWN = 20


def time_per_token(state: PodState, model: bytes) -> Result | None:
    """Microseconds per output token over the route used last; None before a request told."""
    breakdown = state.timings.breakdown(model)
    if breakdown is None:
        return None
    num_tokens = breakdown.num_output_tokens
    return {
        "num_requests": breakdown.num_requests,
        "num_output_tokens": num_tokens,
        "total_us": _share(breakdown.total_us, num_tokens),
        "stages": [_stage(state, stage, num_tokens) for stage in breakdown.stages],
        "head_and_links_us": _share(breakdown.rest_us, num_tokens),
    }


def request_rows(state: PodState) -> list[Result]:
    """Newest first, in microseconds of the whole request."""
    return [
        {
            "time_ms": request.time_ms,
            "model": model_name(state.roster, request.model),
            "num_prompt_tokens": request.num_prompt_tokens,
            "num_output_tokens": request.num_output_tokens,
            "tokens_per_s": request.tokens_per_s,
            "total_us": request.total_us,
            "stages": [_stage(state, stage, 1) for stage in request.stages],
        }
        for request in list(state.timings.recent)[: -MAX_NUM_SHOWN - 1 : -1]
    ]


def token_times(state: PodState, model: bytes) -> tuple[TokenTime, ...]:
    """The same for the dashboard; empty before a request told."""
    breakdown = state.timings.breakdown(model)
    if breakdown is None:
        return ()
    num_tokens = breakdown.num_output_tokens
    rows = [
        TokenTime(
            f"{node_name(state.roster, stage.node)}[{stage.start_layer}:{stage.end_layer})",
            stage.compute_us / num_tokens,
            stage.queue_us / num_tokens,
            stage.hop_us / num_tokens,
            stage.total_us / num_tokens,
        )
        for stage in breakdown.stages
    ]
    return (*rows, TokenTime("head and links", 0, 0, 0, breakdown.rest_us / num_tokens))


def stage_seconds(state: PodState) -> tuple[StageSeconds, ...]:
    """For the metrics: one row for each pair of names, whoever had them."""
    sums: dict[tuple[str, str], StageSum] = {}
    for (model, node), known in state.timings.sums.items():
        names = model_name(state.roster, model), node_name(state.roster, node)
        sums.setdefault(names, StageSum()).add(known)
    return tuple(
        StageSeconds(
            *names, known.num_steps, known.compute_us / 1e6, known.queue_us / 1e6, known.hop_us / 1e6
        )
        for names, known in sums.items()
    )


def _stage(state: PodState, stage: StageTime, num_tokens: int) -> Result:
    return {
        "node": node_name(state.roster, stage.node),
        "start_layer": stage.start_layer,
        "end_layer": stage.end_layer,
        "num_steps": stage.num_steps,
        "compute_us": _share(stage.compute_us, num_tokens),
        "queue_us": _share(stage.queue_us, num_tokens),
        "hop_us": _share(stage.hop_us, num_tokens),
        "link_us": stage.link_us,
        "total_us": _share(stage.total_us, num_tokens),
    }


def _share(time_us: int, num_tokens: int) -> float:
    return round(time_us / num_tokens, 1)
