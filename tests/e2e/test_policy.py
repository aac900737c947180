"""A new policy at real nodes: set at one, in force at all. It prices requests; transfers reach everybody."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from node.local_pod import LocalNode
from tests.e2e.conftest import MODEL, LocalPod, start_pod, stop_pod, wait_until

pytestmark = pytest.mark.processes


def price_per_token(pod: LocalPod, index: int, prompt: str) -> Fraction:
    """Microcredits per token of one request through this node, as its ledger says."""
    known = {row["session"] for row in pod.nodes[index].pod("ledger")["recent"]}
    pod.client(index).completions.create(model=MODEL, prompt=prompt, max_tokens=4, temperature=0)
    books = pod.nodes[index].pod("ledger")
    (row,) = [row for row in books["recent"] if row["session"] not in known]
    assert row["state"] == "settled"
    return Fraction(row["amount_microcredits"], row["num_prompt_tokens"] + row["num_output_tokens"])


def treasury(node: LocalNode) -> Any:
    return node.pod("treasury")


def test_a_policy_is_in_force_everywhere_and_prices_requests(tmp_path: Path, packages: Path) -> None:
    pod = start_pod(tmp_path, packages, ("ada", "ben"))
    try:
        before = price_per_token(pod, 1, "One:")
        changes = ("--prompt-weight", "2", "--output-weight", "2", "--levy", "10%", "--dividend", "100%")
        published = pod.nodes[0].pod("treasury", "set", *changes)
        assert published["set_by"] == "ada"

        def all_know() -> bool:
            return all(treasury(node)["policy"] == published for node in pod.nodes)

        wait_until("the policy is in force at both nodes", all_know, 10)
        levied = treasury(pod.nodes[1])["levied_microcredits"]
        # Stages round down, by less than a microcredit each.
        for index, prompt in ((1, "Two:"), (0, "Three:")):
            assert abs(price_per_token(pod, index, prompt) - 2 * before) < 2
        moved = pod.nodes[0].pod("transfer", "ben", "12.5")
        assert moved["amount_microcredits"] == 12_500_000

        def agreed() -> Any:
            found = [treasury(node) for node in pod.nodes]
            books = [node.pod("ledger")["accounts"] for node in pod.nodes]
            return found[0] if found[0] == found[1] and books[0] == books[1] else None

        state = wait_until("both nodes show the same treasury and accounts", agreed, 10)
        assert state["levied_microcredits"] > levied
        assert 0 < state["dividends_due_microcredits"] <= state["levied_microcredits"]
        for node in pod.nodes:
            verified = node.pod("ledger", "verify")
            assert verified["ok"], verified
    finally:
        stop_pod(pod)
