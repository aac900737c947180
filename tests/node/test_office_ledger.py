"""A node whose ledger file was lost does not begin its journal a second time."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from node.home import PodHome
from node.office import begin_books, create_pod, is_ledger_old, open_ledger, open_membership
from pod.membership import Membership


@pytest.mark.parametrize(
    ("has_plan", "has_others", "is_old", "num_entries"),
    [(True, True, True, None), (False, True, False, 1), (True, False, False, 2)],
)
def test_a_lost_ledger_is_not_begun_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_plan: bool,
    has_others: bool,
    is_old: bool,
    num_entries: int | None,
) -> None:
    """Credit is issued once, where the pod was made; others may know a journal that is not here."""
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
    with closing(open_ledger(home, membership)) as thread:
        assert thread.ledger.num_entries() == 0
        assert is_ledger_old(home, membership, thread.ledger) is is_old
        if num_entries is not None:
            begin_books(membership, thread.ledger)
            assert thread.ledger.num_entries() == num_entries
