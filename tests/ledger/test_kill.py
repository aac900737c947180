"""kill -9 while entries are being written: what was reported durable is there, nothing is half there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from threading import Timer

from ledger.entry import decode_entry
from tests.ledger.world import World, raws

ROOT = Path(__file__).parents[2]
DEADLINE_S = 30.0
NUM_KILLS = 4


def run_and_kill(url: str, first: int, num_lines: int) -> list[str]:
    """Kill the writer after it reported `num_lines` entries, in the middle of whatever it does then."""
    command = [sys.executable, "-m", "tests.ledger.killed_writer", url, str(first)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        watchdog = Timer(DEADLINE_S, process.kill)
        watchdog.start()
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(num_lines)]
        process.kill()
        lines += process.stdout.read().splitlines()
        watchdog.cancel()
    assert all(lines), "the writer ended before it was killed"
    return [line.strip() for line in lines]


def test_kill_leaves_an_intact_journal(database_url: str) -> None:
    url, num_sessions, world = database_url, 0, World()
    for number in range(NUM_KILLS):
        reported = run_and_kill(url, first=1_000 * number, num_lines=3 + 5 * number)
        ledger = world.ledger(0, url)
        stored = {f"{entry.index} {entry.hash.hex()}" for entry in map(decode_entry, raws(ledger))}
        # The last line may be cut short by the kill; every whole line was a promise.
        promised = {line for line in reported if len(line.split()[-1]) == 64}
        assert promised <= stored
        assert ledger.verify() == []
        assert sum(ledger.balances().values()) == 0
        assert ledger.forks() == []
        num_sessions += len(promised)
        assert ledger.num_entries() >= 2 * num_sessions
        # At most the session that was being written has a hold and no settlement.
        assert len(ledger.open_holds()) <= number + 1
        ledger.close()
