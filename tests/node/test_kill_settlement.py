"""kill -9 while a head settles, fifty times: what clients were told is written, and each hold ends once."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from ledger.entry import HoldOpened, HoldSettled, HoldVoided, decode_entry
from ledger.ledger import Ledger
from tests.ledger.world import raws
from tests.node.session_world import Pod
from tests.node.settling_head import NUM_AT_ONCE, settle_until_killed

NUM_JOURNALS = 5
NUM_KILLS = 10
MAX_RUN_S = 0.1
DEADLINE_S = 60.0


def run_and_kill(url: str, seed: int, run_s: float) -> dict[bytes, int]:
    """What the head had told its clients when it was killed: output tokens by session."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.node.settling_head"])
    reports, theirs = context.Pipe(duplex=False)
    process = context.Process(target=settle_until_killed, args=(url, seed, theirs), daemon=True)
    process.start()
    theirs.close()
    assert reports.poll(DEADLINE_S), "the head settled nothing"
    time.sleep(run_s)
    process.kill()
    process.join(DEADLINE_S)
    assert process.exitcode == -9
    return dict(_read_all(reports))


def _read_all(reports: Connection) -> list[tuple[bytes, int]]:
    told = []
    while True:
        try:
            told.append(reports.recv())
        except (EOFError, OSError):
            return told


def endings_of(ledger: Ledger) -> tuple[set[bytes], dict[bytes, HoldSettled | HoldVoided], Counter[bytes]]:
    """Sessions with a hold, their endings, and how often each has ended."""
    opened: set[bytes] = set()
    endings: dict[bytes, HoldSettled | HoldVoided] = {}
    num_endings: Counter[bytes] = Counter()
    for raw in raws(ledger):
        match decode_entry(raw).body:
            case HoldOpened(session=session):
                opened.add(session)
            case (HoldSettled() | HoldVoided()) as ending:
                endings[ending.session] = ending
                num_endings[ending.session] += 1
    return opened, endings, num_endings


@pytest.mark.parametrize("journal", range(NUM_JOURNALS))
def test_a_killed_head_has_settled_what_it_said_and_the_rest_is_resolved(
    tmp_path: Path, journal: int
) -> None:
    url, rng = f"sqlite:///{tmp_path}/ledger.sqlite", random.Random(journal)
    told: dict[bytes, int] = {}
    num_recovered = 0
    for number in range(NUM_KILLS):
        told |= run_and_kill(url, NUM_KILLS * journal + number, rng.uniform(0, MAX_RUN_S))
        pod = Pod(url)
        assert len(pod.ledger.open_holds()) <= NUM_AT_ONCE
        num_recovered += asyncio.run(pod.head.recover())
        assert pod.ledger.open_holds() == []
        opened, endings, num_endings = endings_of(pod.ledger)
        assert opened == set(endings)
        assert set(num_endings.values()) == {1}
        for session, num_output_tokens in told.items():
            ending = endings[session]
            settled = ending.num_output_tokens if isinstance(ending, HoldSettled) else 0
            assert settled == num_output_tokens
            if isinstance(ending, HoldSettled):
                counts = {signed.receipt.num_output_tokens for signed in ending.receipts}
                assert counts <= {settled, 1, 65}
        assert sum(pod.ledger.balances().values()) == 0
        assert pod.ledger.forks() == []
        pod.thread.close()
    ledger = Pod(url).ledger
    assert ledger.verify() == []
    ledger.close()
    assert len(told) > NUM_KILLS
    # The kills did hit sessions that were open.
    assert num_recovered > 0
