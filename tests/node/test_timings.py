"""Where a request's time went: through a real head, in what `pod status` shows, and against liars."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from node.cli.times import times_tables
from node.links.frames import Sampling, Stage, StageTiming
from node.pod_state import PodState
from node.sessions.session import HeadSession
from node.sessions.timings import (
    MAX_NUM_RECENT,
    MAX_NUM_SUMS,
    RequestTime,
    StageTime,
    Timings,
    time_of,
)
from node.time_view import request_rows, stage_seconds, time_per_token, token_times
from tests.engine.ring import Ring
from tests.engine.tiny import make_tiny
from tests.node.ring_head import RingHead, read_and_settle

MODEL = b"m" * 32
A, B = b"a" * 32, b"b" * 32
ROUTE = (Stage(A, "a:1", 0, 2), Stage(B, "b:1", 2, 4))


def stage_time(node: bytes, compute_us: int, link_us: int = 50) -> StageTime:
    return StageTime(node, 0 if node == A else 2, 2 if node == A else 4, 10, compute_us, 20, 500, link_us)


def request_time(tokens_per_s: float = 100.0, **changes: Any) -> RequestTime:
    stages = (stage_time(A, 1000), stage_time(B, 2000))
    return replace(RequestTime(1, MODEL, 5, 10, 9000, tokens_per_s, stages), **changes)


def session(timings: dict[int, StageTiming], **changes: Any) -> HeadSession:
    known = {
        "terms": SimpleNamespace(model=MODEL, prompt_ids=(1, 2, 3), route=ROUTE),
        "tokens_per_s": 50.0,
        "began_s": 100.0,
        "last_token_s": 100.5,
        "token_ids": [1] * 8,
        "timings": timings,
        "num_attempts": 1,
    }
    return cast(HeadSession, SimpleNamespace(**known | changes))


def timing(index: int, **changes: int) -> StageTiming:
    return replace(StageTiming(b"s" * 16, index, 8, 100_000, 1000, 200), **changes)


def test_a_session_becomes_its_times() -> None:
    found = time_of(session({0: timing(0), 1: timing(1, compute_us=50_000)}), 7)
    assert found is not None
    assert (found.total_us, found.num_output_tokens, found.num_prompt_tokens) == (500_000, 8, 3)
    assert [stage.total_us for stage in found.stages] == [100_000 + 1000 + 1600, 50_000 + 1000 + 1600]


@pytest.mark.parametrize(
    "odd",
    [
        session({0: timing(0)}),
        session({0: timing(0), 1: timing(1, compute_us=2**62)}),
        session({0: timing(0), 1: timing(1, link_us=2**62, num_steps=2**62)}),
        session({0: timing(0), 1: timing(1)}, num_attempts=2),
    ],
)
def test_times_that_cannot_be_told_are_left_out(odd: HeadSession) -> None:
    found = time_of(odd, 7)
    assert found is not None
    assert found.stages == ()
    assert found.tokens_per_s == 50.0


def test_too_short_an_answer_tells_nothing() -> None:
    assert time_of(session({}, tokens_per_s=None), 7) is None


def test_what_is_kept_is_bounded() -> None:
    timings = Timings()
    for number in range(MAX_NUM_SUMS + 50):
        timings.add(request_time(model=number.to_bytes(32, "big")))
    assert len(timings.recent) == MAX_NUM_RECENT
    assert len(timings.sums) == MAX_NUM_SUMS


def test_the_parts_add_up_to_the_whole() -> None:
    timings = Timings()
    assert timings.breakdown(MODEL) is timings.tokens_per_s(MODEL) is None
    timings.add(request_time(10.0, stages=()))
    assert timings.breakdown(MODEL) is None
    other_route = (stage_time(B, 1), stage_time(A, 1))
    for request in (request_time(20.0, stages=other_route), request_time(30.0), request_time(90.0)):
        timings.add(request)
    found = timings.breakdown(MODEL)
    assert found is not None
    assert (found.num_requests, found.num_output_tokens, found.total_us) == (2, 20, 18_000)
    assert [stage.compute_us for stage in found.stages] == [2000, 4000]
    assert found.rest_us + sum(stage.total_us for stage in found.stages) == found.total_us
    assert timings.tokens_per_s(MODEL) == 25.0
    assert timings.sums[MODEL, B].compute_us == 1 + 2000 + 2000


def test_the_shortest_way_lately_is_the_way() -> None:
    timings = Timings()
    for link_us in (300, 80, 0, 90):
        timings.add(request_time(stages=(stage_time(A, 1, link_us), stage_time(B, 1, 70))))
    assert timings.links_us() == {(A, B): 80, (B, A): 70}


def state_with(timings: Timings) -> PodState:
    nodes = {node: SimpleNamespace(name=name) for node, name in ((A, "ada"), (B, "ben"))}
    model = SimpleNamespace(name="tiny", id=MODEL)
    roster = SimpleNamespace(nodes=nodes, former_nodes={}, models={"tiny": model})
    return cast(PodState, SimpleNamespace(timings=timings, roster=roster))


def test_what_status_shows(capsys: pytest.CaptureFixture[str]) -> None:
    timings = Timings()
    timings.add(request_time())
    state = state_with(timings)
    told = time_per_token(state, MODEL)
    assert told is not None
    assert json.loads(json.dumps(told)) == {
        "num_requests": 1,
        "num_output_tokens": 10,
        "total_us": 900.0,
        "stages": [
            {
                "node": name,
                "start_layer": start,
                "end_layer": start + 2,
                "num_steps": 10,
                "compute_us": compute_us,
                "queue_us": 2.0,
                "hop_us": 50.0,
                "link_us": 50,
                "total_us": compute_us + 52.0,
            }
            for name, start, compute_us in (("ada", 0, 100.0), ("ben", 2, 200.0))
        ],
        "head_and_links_us": 496.0,
    }
    assert list(request_rows(state)[0]) == [
        "time_ms",
        "model",
        "num_prompt_tokens",
        "num_output_tokens",
        "tokens_per_s",
        "total_us",
        "stages",
    ]
    times_tables([{"name": "tiny", "time_per_token": told}, {"name": "other", "time_per_token": None}])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert lines[2:] == [
        ["ada[0:2)", "0.10", "0.00", "0.05", "0.15"],
        ["ben[2:4)", "0.20", "0.00", "0.05", "0.25"],
        ["head", "and", "links", "0.50"],
        ["a", "token", "0.90"],
    ]
    assert time_per_token(state_with(Timings()), MODEL) is None


def test_what_dashboard_and_metrics_show() -> None:
    timings = Timings()
    timings.add(request_time())
    timings.add(request_time(model=b"x" * 32))
    state = state_with(timings)
    shown = token_times(state, MODEL)
    assert [row.place for row in shown] == ["ada[0:2)", "ben[2:4)", "head and links"]
    assert sum(row.total_us for row in shown) == 900
    assert token_times(state_with(Timings()), MODEL) == ()
    first, *others = stage_seconds(state)
    assert (first.model_name, first.node_name, first.num_steps) == ("tiny", "ada", 10)
    assert (first.compute_s, first.queue_s, first.hop_s) == (0.001, 0.00002, 0.0005)
    assert len(others) == 3
    # A node that came back under another's name is the same line to whoever scrapes.
    state.roster.nodes[B].name = "ada"  # type: ignore[misc]
    assert [row.num_steps for row in stage_seconds(state)] == [20, 20]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_a_real_request_tells_where_its_time_went(tmp_path: Path) -> None:
    llama = make_tiny("llama", tmp_path)
    with Ring(llama.package, (2,)) as ring:
        head = RingHead(ring)
        async with asyncio.timeout(60):
            opened = await head.open([5, 6, 7], Sampling(max_num_output_tokens=12, ignore_eos=True))
            await read_and_settle(opened)
        head.close()
        found = time_of(opened, 1)
    assert found is not None
    assert found.num_output_tokens == 12
    assert found.tokens_per_s > 0
    # The last word of a stage may come too late to be heard; what is told is whole.
    assert found.route in ((), tuple((s.node, s.start_layer, s.end_layer) for s in ring.route))
    assert all(0 < stage.compute_us <= found.total_us for stage in found.stages)


def test_only_a_long_way_is_told_to_others() -> None:
    state = PodState(node=A, roster=None, adverts=dict, live=frozenset, catalogue=None)  # type: ignore[arg-type]
    assert state.link_rtt_us() == 0
    state.timings.add(request_time())
    assert state.link_rtt_us() == 0
    state.timings.recent.clear()
    state.timings.add(request_time(stages=(stage_time(A, 1, 10_000), stage_time(B, 1, 90_000))))
    assert state.link_rtt_us() == 20_000
