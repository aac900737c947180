"""A node whose ledger file was lost does not begin its journal a second time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from node.home import PodHome
from node.office import create_pod, open_ledger, open_membership
from pod.membership import Membership


@pytest.mark.parametrize(
    ("has_plan", "has_others", "num_entries"), [(True, True, 0), (False, True, 2), (True, False, 2)]
)
def test_a_lost_ledger_is_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_plan: bool, has_others: bool, num_entries: int
) -> None:
    home = PodHome(tmp_path / "home")
    create_pod(home, "alpha", "olga", "desk")
    for path in home.path.glob("ledger*"):
        path.unlink()
    membership = open_membership(home)
    roster = membership.roster
    if has_others:
        other = replace(roster.nodes[membership.node_id], id=b"O" * 32)
        roster = replace(roster, nodes={**roster.nodes, other.id: other})
    monkeypatch.setattr(Membership, "roster", property(lambda self: roster))
    if has_plan:
        home.plan_file.write_bytes(b"a plan of earlier")
    thread = open_ledger(home, membership)
    assert thread.ledger.num_entries() == num_entries
    thread.close()
