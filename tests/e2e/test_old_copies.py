"""A node that comes back from an old copy of itself, or without its ledger, never forks its journal."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from node.local_pod import LocalNode

pytestmark = pytest.mark.processes

DEADLINE_S = 60.0
PASSPHRASE = "correct horse battery staple"


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[LocalNode, LocalNode]]:
    """Two members with a node each; both run."""
    made = (LocalNode("ada", tmp_path / "ada"), LocalNode("ben", tmp_path / "ben"))
    first, second = made
    first.pod("create", "alpha", "--member", "ada")
    try:
        first.start("up", "--no-serve")
        first.wait_until_up()
        second.start("join", first.pod("invite")["invite"], "--member", "ben", "--no-serve")
        second.wait_until_up()
        wait_for(lambda: balance(first, "ben") > 0)
        yield made
    finally:
        second.stop()
        first.stop()


def wait_for(condition: Any) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come to pass"
        time.sleep(0.2)


def balance(node: LocalNode, member: str) -> int:
    accounts = node.pod("ledger")["accounts"]
    return next((int(a["balance_microcredits"]) for a in accounts if a["name"] == member), 0)


@pytest.mark.parametrize("way", ["backup", "copy", "lost ledger"])
def test_an_old_copy_goes_on_under_a_new_key(
    nodes: tuple[LocalNode, LocalNode], tmp_path: Path, way: str
) -> None:
    first, second = nodes
    (tmp_path / "passphrase").write_text(PASSPHRASE)
    sealed = ("--passphrase-file", str(tmp_path / "passphrase"))
    if way == "backup":
        second.pod("backup", str(tmp_path / "ben.backup"), *sealed)
    else:
        second.stop()
        shutil.copytree(second.home, tmp_path / "old copy")
        second.start("up", "--no-serve")
        second.wait_until_up()
    before = balance(first, "ada")
    second.pod("transfer", "ada", "1")
    wait_for(lambda: balance(first, "ada") == before + 1_000_000)
    old_key = (second.home / "keys" / "node.pem").read_bytes()
    second.stop()

    shutil.move(second.home, tmp_path / "gone")
    if way == "backup":
        second.pod("restore", str(tmp_path / "ben.backup"), *sealed)
    elif way == "copy":
        shutil.move(tmp_path / "old copy", second.home)
    else:
        shutil.copytree(tmp_path / "gone", second.home)
        for path in second.home.glob("ledger.sqlite*"):
            path.unlink()
    second.start("up", "--no-serve")
    second.wait_until_up()
    assert (second.home / "keys" / "node.pem").read_bytes() != old_key
    wait_for(lambda: balance(second, "ada") == before + 1_000_000)
    second.pod("transfer", "ada", "2")
    wait_for(lambda: balance(first, "ada") == before + 3_000_000)

    for node in nodes:
        verified = node.pod("ledger", "verify")
        assert verified["ok"], verified["violations"]
    wait_for(lambda: first.pod("ledger")["digest"] == second.pod("ledger")["digest"])
    assert len(first.pod("status")["nodes"]) == 2
    if way != "backup":
        return
    # Once is enough: the next start goes on with the new key.
    new_key = (second.home / "keys" / "node.pem").read_bytes()
    second.stop()
    second.start("up", "--no-serve")
    second.wait_until_up()
    assert (second.home / "keys" / "node.pem").read_bytes() == new_key
