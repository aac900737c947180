"""kill -9 is an ordinary event: the client hears of it, the books are right, the pod comes back."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import openai
import pytest

from node.local_pod import LocalNode
from tests.e2e.conftest import MODEL, LocalPod, wait_until

pytestmark = pytest.mark.processes
# Every chunk says how many tokens there have been.
COUNTED: Any = {"include_usage": True, "continuous_usage_stats": True}


def kill(node: LocalNode) -> None:
    """Node and engine at once, like a power cut."""
    assert node.process is not None
    os.killpg(node.process.pid, signal.SIGKILL)
    node.process.wait(10)


def identity(node: LocalNode) -> str:
    return str(node.pod("status")["node"]["id"])


def test_a_stage_killed_in_a_stream_ends_it_and_the_pod_recovers(mortal_pod: LocalPod) -> None:
    asked, victim = mortal_pod.nodes[0], mortal_pod.nodes[2]
    before = identity(victim)
    untouched = [node.process.pid for node in mortal_pod.nodes[:2] if node.process is not None]
    stream = mortal_pod.client(0).completions.create(
        model=MODEL,
        prompt="Once upon a time",
        max_tokens=2000,
        temperature=0,
        stream=True,
        stream_options=COUNTED,
        extra_body={"ignore_eos": True},
    )
    counts = [next(stream).usage.completion_tokens for _ in range(5)]
    kill(victim)
    killed_s = time.monotonic()
    with pytest.raises(openai.APIError) as failure:
        counts.extend(chunk.usage.completion_tokens for chunk in stream)
    assert time.monotonic() - killed_s < 10
    assert failure.value.message

    def settled() -> bool:
        books = asked.pod("ledger")
        newest = books["recent"][0]
        return books["num_open_holds"] == 0 and (newest["state"], newest["num_output_tokens"]) == (
            "settled",
            counts[-1],
        )

    wait_until("the hold is settled at what the client was given", settled, 10)
    victim.start("up")
    victim.wait_until_up()
    assert identity(victim) == before

    def answers() -> bool:
        try:
            done = mortal_pod.client(1).completions.create(model=MODEL, prompt="Hello", max_tokens=4)
        except openai.APIStatusError:
            return False
        return bool(done.choices[0].text)

    wait_until("the next request works", answers, 60, 0.5)
    assert untouched == [node.process.pid for node in mortal_pod.nodes[:2] if node.process is not None]
    for node in mortal_pod.nodes:
        assert node.pod("ledger", "verify")["ok"]


def test_any_node_comes_back_as_itself_after_kill_9(mortal_pod: LocalPod) -> None:
    mortal_pod.client(0).completions.create(model=MODEL, prompt="Hello", max_tokens=4)
    for node in mortal_pod.nodes:
        before, num_entries = identity(node), node.pod("ledger")["num_entries"]
        kill(node)
        verified = node.pod("ledger", "verify")
        assert verified["ok"]
        assert verified["num_entries"] >= num_entries
        node.start("up")
        node.wait_until_up()
        assert identity(node) == before
    for index in range(3):
        mortal_pod.wait_ready(index, 1)
    mortal_pod.client(1).completions.create(model=MODEL, prompt="Hello", max_tokens=4)
