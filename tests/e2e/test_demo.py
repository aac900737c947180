"""`pod demo` is the first thing anyone tries: it must end by itself, with the answer and the books."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes


def test_the_demo_answers_over_three_nodes_and_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "node", "demo", "--json"],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert "Paris" in result["answer"]
    assert len({part.split("[")[0] for part in result["route"].split(",")}) == 3
    assert result["ledger_sum_microcredits"] == 0
    assert result["ledger_verified"]
    assert result["tokens_per_s"] > 0
