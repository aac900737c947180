"""An idle node leaves the machine to its owner."""

from __future__ import annotations

import os
import time

import psutil
import pytest

from tests.e2e.conftest import LocalPod

pytestmark = pytest.mark.processes

WINDOW_S = 10.0
MAX_SHARE_OF_A_CORE = 0.03


def _cpu_s(pid: int) -> float:
    """CPU time of a node and its engine so far."""
    node = psutil.Process(pid)
    times = [process.cpu_times() for process in (node, *node.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def test_an_idle_node_uses_under_three_percent_of_a_core(pod: LocalPod) -> None:
    pids = [node.process.pid for node in pod.nodes if node.process is not None]
    assert os.getpid() not in pids
    before = [_cpu_s(pid) for pid in pids]
    time.sleep(WINDOW_S)
    shares = [(_cpu_s(pid) - began) / WINDOW_S for pid, began in zip(pids, before, strict=True)]
    assert max(shares) < MAX_SHARE_OF_A_CORE, shares
