"""Who plans, when, and whom a plan waits for: with a clock and a state that the test sets."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest

from node.placement.view import DeployedModel, View
from node.plan_book import PlanBook
from node.planner import PATIENCE_S, Planner
from node.pod_state import PodState
from node.pod_view import build_view
from node.status import NodeStatus
from pod.identity import KeyPair
from pod.roster.roster import Node, Roster

MODEL = b"m" * 32
KEYS = sorted((KeyPair.of_seed(bytes([n]) * 32) for n in range(3)), key=lambda key: key.public)
IDS = [key.public for key in KEYS]
SERVING = NodeStatus(
    serving=True,
    starting=False,
    device="cpu",
    memory_bytes=8 * 2**30,
    bytes_per_second=10**9,
    data_address="127.0.0.1:1",
    api_url="",
    software="test",
    models_available=(MODEL,),
)
STARTING = replace(SERVING, serving=False, starting=True, models_available=())
DEPLOYED = DeployedModel(MODEL, "model", (1000,) * 6, 1000, 1000, 100, 512, split=3)


@dataclass
class FakeState:
    """The part of `PodState` that a planner asks."""

    known: dict[bytes, NodeStatus] = field(default_factory=lambda: dict.fromkeys(IDS, SERVING))
    alive: frozenset[bytes] = frozenset(IDS)

    @property
    def roster(self) -> Roster:
        nodes = {id: Node(id, id, f"node{n}", b"") for n, id in enumerate(IDS)}
        return Roster(b"", "", {}, nodes, {}, {}, frozenset(), {}, (), (), frozenset(), (), {}, {})

    def live(self) -> frozenset[bytes]:
        return self.alive

    def statuses(self) -> dict[bytes, NodeStatus]:
        return self.known

    def view(self) -> View:
        return replace(build_view(self.roster, self.known, self.alive, ()), models=(DEPLOYED,))


class Bench:
    """One planner per node over one state, each with its own book."""

    def __init__(self, path: Path, allowed: frozenset[bytes] = frozenset(IDS)) -> None:
        self.now_s = 1000.0
        self.state = FakeState()
        self.books = [
            PlanBook(path / str(n), lambda node: node in allowed, lambda: None) for n in range(len(KEYS))
        ]
        self.planners = [
            Planner(key.public, cast(PodState, self.state), book, key.sign, lambda: self.now_s)
            for key, book in zip(KEYS, self.books, strict=True)
        ]

    def consider(self) -> list[bool]:
        """Every node considers; what one publishes the others are told."""
        planned = []
        for planner, book in zip(self.planners, self.books, strict=True):
            planned.append(asyncio.run(planner.consider()))
            for other in self.books:
                asyncio.run(other.ingest(b"peer", book.missing(other.summary())[0]))
        return planned

    def ranges(self) -> list[tuple[int, int, int]]:
        plan = self.books[0].plan
        return [(a.start_layer, a.end_layer, IDS.index(a.node)) for a in plan.assignments] if plan else []


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_only_the_smallest_serving_node_plans_and_once(bench: Bench) -> None:
    assert bench.consider() == [True, False, False]
    assert len(bench.ranges()) == 3
    assert bench.consider() == [False, False, False]
    assert len({book.digest() for book in bench.books}) == 1


def test_nodes_that_are_starting_are_waited_for_but_not_forever(bench: Bench) -> None:
    bench.state.known[IDS[2]] = STARTING
    assert bench.consider() == [False, False, False]
    bench.now_s += PATIENCE_S + 1
    assert bench.consider() == [True, False, False]
    assert len(bench.ranges()) == 2


def test_nodes_that_have_not_looked_for_the_files_yet_are_waited_for(bench: Bench) -> None:
    bench.state.known[IDS[1]] = replace(SERVING, models_available=())
    bench.state.known[IDS[2]] = replace(SERVING, models_available=())
    assert not any(bench.consider())
    bench.state.known[IDS[1]] = SERVING
    bench.state.known[IDS[2]] = replace(SERVING, models_available=(), problems=((MODEL, "no such file"),))
    assert bench.consider() == [True, False, False]
    assert len(bench.ranges()) == 2


def test_a_restart_moves_nothing(bench: Bench) -> None:
    bench.consider()
    before = bench.ranges()
    bench.state.alive -= {IDS[0]}
    assert not any(bench.consider())
    bench.now_s += 3
    bench.state.alive |= {IDS[0]}
    bench.state.known[IDS[0]] = STARTING
    assert not any(bench.consider())
    bench.state.known[IDS[0]] = SERVING
    assert not any(bench.consider())
    assert bench.ranges() == before


def test_a_node_that_stays_away_is_replaced_by_whoever_is_smallest_then(bench: Bench) -> None:
    bench.consider()
    bench.state.alive -= {IDS[0]}
    bench.consider()
    bench.now_s += PATIENCE_S + 1
    assert bench.consider() == [False, True, False]
    assert {node for _, _, node in bench.ranges()} == {1, 2}


def test_a_node_that_restarts_again_and_again_does_not_stop_planning(bench: Bench) -> None:
    bench.state.known[IDS[2]] = STARTING
    planned = False
    for _ in range(10):
        bench.now_s += PATIENCE_S / 2
        bench.state.alive ^= {IDS[2]}
        planned = planned or any(bench.consider())
    assert planned


def test_a_guest_with_the_smallest_id_leaves_planning_to_the_others(tmp_path: Path) -> None:
    bench = Bench(tmp_path, frozenset(IDS[1:]))
    assert bench.consider() == [False, True, False]


def test_a_plan_outlives_its_author(tmp_path: Path) -> None:
    allowed = set(IDS)
    bench = Bench(tmp_path)
    for book in bench.books:
        book._may_plan = allowed.__contains__
    bench.consider()
    before = bench.ranges()
    # The author may no longer plan but still serves: the same ranges, in a name that counts.
    allowed.remove(IDS[0])
    assert bench.consider() == [False, True, False]
    assert bench.ranges() == before
    plan = bench.books[2].plan
    assert plan is not None
    assert (plan.epoch, plan.author) == (2, IDS[1])
