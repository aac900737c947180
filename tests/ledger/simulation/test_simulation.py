"""Many seeds of the simulation, those that ever failed among them, and a crash at every single write.

POD_SIMULATION_SEEDS says which seeds run beside the kept ones: a number, or `first:end`. Default: 0:200.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.ledger.simulation.durable import Crash
from tests.ledger.simulation.people import each_signature_checked_once
from tests.ledger.simulation.simulation import Plan, Simulation

ROOT = Path(__file__).parents[3]
KEPT = Path(__file__).with_name("kept_seeds.txt")
VARIABLE = "POD_SIMULATION_SEEDS"
DEFAULT_SEEDS = "0:200"
# Each seed of the kind below has these in common with the runs of the whole range.
SQLITE_EVERY = 20
REAL_SIGNATURES_EVERY = 40
# Seeds run in groups: the signatures of one are rarely those of another, but tests are cheaper to count.
SEEDS_PER_TEST = 10
CRASH_SEED = 7
CRASH_SHAPE = {"num_nodes": 5, "num_steps": 25}


def kept_seeds() -> list[int]:
    lines = KEPT.read_text().splitlines()
    return [int(line) for line in lines if line and not line.startswith("#")]


def asked_seeds() -> list[int]:
    first, _, end = os.environ.get(VARIABLE, DEFAULT_SEEDS).partition(":")
    return list(range(int(first), int(end) if end else int(first) + 1))


def groups() -> list[list[int]]:
    seeds = list(dict.fromkeys(kept_seeds() + asked_seeds()))
    return [seeds[start : start + SEEDS_PER_TEST] for start in range(0, len(seeds), SEEDS_PER_TEST)]


def run(plan: Plan) -> Simulation:
    """Raises Failed, with what to type to see it again."""
    simulation = Simulation(plan)
    remembering = each_signature_checked_once if plan.seed % REAL_SIGNATURES_EVERY else nullcontext
    try:
        with remembering():
            simulation.run()
    except Exception as error:
        raise Failed(told(simulation, plan, error)) from error
    return simulation


class Failed(Exception):
    pass


def told(simulation: Simulation, plan: Plan, error: Exception) -> str:
    command = f"{VARIABLE}={plan.seed} .venv/bin/python -m pytest {Path(__file__).relative_to(ROOT)}"
    trace = "\n  ".join(simulation.trace)
    return f"{plan}: {type(error).__name__}: {error}\nagain: {command}\n  {trace}"


def keep(seed: int) -> None:
    if seed not in kept_seeds():
        with KEPT.open("a") as file:
            file.write(f"{seed}\n")


@pytest.mark.parametrize("seeds", groups(), ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_honest_nodes_end_equal_whatever_happens(seeds: list[int], tmp_path: Path) -> None:
    for seed in seeds:
        folder = tmp_path / str(seed) if seed % SQLITE_EVERY == 0 else None
        if folder is not None:
            folder.mkdir()
        try:
            run(Plan(seed, folder=folder))
        except Failed:
            keep(seed)
            raise


def crash_points() -> Iterator[tuple[int, int, Crash]]:
    """Every write of one small run, whose it is, and the ways to fail in it."""
    writers = run(Plan(CRASH_SEED, crash_at=(0, Crash.AFTER), **CRASH_SHAPE)).writers
    assert len(writers) > 20
    for number, writer in enumerate(writers, start=1):
        for crash in Crash:
            yield number, writer, crash


def test_a_crash_at_every_write_loses_nothing_and_leaves_nothing_half_done() -> None:
    num_crashes = 0
    for number, _, crash in crash_points():
        num_crashes += run(Plan(CRASH_SEED, crash_at=(number, crash), **CRASH_SHAPE)).truth.num_crashes
    assert num_crashes > 60


def test_a_crash_at_every_write_to_a_database(tmp_path: Path) -> None:
    """Power fails with a transaction open in the file: the next life finds all of it or nothing."""
    num_crashes = 0
    for number, writer, crash in crash_points():
        if writer == 0:
            folder = tmp_path / f"{number} {crash.value}"
            folder.mkdir()
            plan = Plan(CRASH_SEED, crash_at=(number, crash), folder=folder, **CRASH_SHAPE)
            num_crashes += run(plan).truth.num_crashes
    assert num_crashes > 10


def test_the_same_seed_does_the_same() -> None:
    first, second = run(Plan(3)), run(Plan(3))
    assert first.trace == second.trace
    assert first.nodes[0].ledger.digest() == second.nodes[0].ledger.digest()
