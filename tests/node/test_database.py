"""Which database holds the ledger: named by `--db`, remembered, and its entries taken along."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from node.database import take_database
from node.errors import UserError
from node.home import PodHome
from node.office import create_pod, open_ledger, open_membership
from tests.ledger.conftest import postgresql as postgresql
from tests.ledger.postgresql import Cluster


def digest(home: PodHome) -> tuple[int, bytes]:
    thread = open_ledger(home, open_membership(home))
    try:
        assert thread.ledger.verify() == []
        return thread.ledger.num_entries(), thread.ledger.digest()
    finally:
        thread.close()


def test_a_pod_on_postgresql_by_the_command_line(tmp_path: Path, postgresql: Cluster) -> None:
    url = postgresql.new_database()
    environment = os.environ | {"POD_HOME": str(tmp_path)}

    def pod(*arguments: str) -> str:
        command = [sys.executable, "-m", "node", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment, timeout=60
        )
        return done.stdout

    pod("create", "alpha", "--db", url)
    assert '"ok": true' in pod("ledger", "verify", "--json")
    assert not list(tmp_path.glob("ledger*"))
    assert (tmp_path / "database").stat().st_mode & 0o077 == 0
    assert PodHome(tmp_path).ledger_url == url


def test_entries_move_to_another_database_and_back(tmp_path: Path, postgresql: Cluster) -> None:
    home = PodHome(tmp_path / "home")
    create_pod(home, "alpha", "olga", "desk")
    pod, before, url = open_membership(home).pod, digest(home), postgresql.new_database()
    take_database(home, pod, url)
    assert (home.ledger_url, digest(home)) == (url, before)
    take_database(home, pod, home.default_ledger_url)
    assert (home.ledger_url, digest(home)) == (home.default_ledger_url, before)


def test_another_pods_database_is_refused_and_the_old_one_stays(tmp_path: Path, postgresql: Cluster) -> None:
    url = postgresql.new_database()
    first, second = PodHome(tmp_path / "first"), PodHome(tmp_path / "second")
    create_pod(first, "alpha", "olga", "desk", url)
    create_pod(second, "beta", "otto", "lamp")
    before = digest(second)
    with pytest.raises(UserError, match="--db: this database holds the ledger of another pod"):
        take_database(second, open_membership(second).pod, url)
    assert (second.ledger_url, digest(second)) == (second.default_ledger_url, before)
    with pytest.raises(UserError, match="another pod"):
        create_pod(PodHome(tmp_path / "third"), "gamma", "ines", "desk", url)
    assert not PodHome(tmp_path / "third").has_pod()
    assert not (tmp_path / "third" / "database").exists()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("mysql://a/b", "--db must begin with"),
        ("sqlite:///relative.sqlite", "--db must begin with"),
        ("postgresql+psycopg://127.0.0.1:1/ledger", "--db: the ledger's database: connection failed"),
    ],
)
def test_a_database_that_cannot_be_is_one_clear_line(tmp_path: Path, url: str, reason: str) -> None:
    home = PodHome(tmp_path)
    with pytest.raises(UserError, match=reason) as caught:
        create_pod(home, "alpha", "olga", "desk", url)
    assert len(str(caught.value).splitlines()) == 1
    assert not home.has_pod()
