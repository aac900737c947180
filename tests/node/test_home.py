"""The state directory: one process at a time, its own files only."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from node.errors import UserError
from node.home import PodHome
from node.office import create_pod


def test_a_second_process_is_refused_and_a_note_of_a_killed_node_counts_as_none(tmp_path: Path) -> None:
    home = PodHome(tmp_path)
    home.acquire()
    running = home.announce_running("http://127.0.0.1:1")
    other = "import sys; from pathlib import Path; from node.home import PodHome; "
    found = subprocess.run(
        [sys.executable, "-c", other + f"print(PodHome(Path({str(tmp_path)!r})).running_node().api_url)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert found.stdout.strip() == running.api_url
    with pytest.raises(UserError, match="in use by a running node"):
        PodHome(tmp_path).acquire()
    note = (tmp_path / "running.json").read_bytes()
    home.release()
    (tmp_path / "running.json").write_bytes(note)
    assert PodHome(tmp_path).running_node() is None
    assert not (tmp_path / "running.json").exists()


def test_leaving_moves_the_pods_files_and_nothing_else(tmp_path: Path) -> None:
    home = PodHome(tmp_path)
    (tmp_path / "holiday.jpg").write_bytes(b"not ours")
    create_pod(home, "pod", "ada", "box")
    kept = home.set_aside()
    assert not home.has_pod()
    assert (kept / "roster.log").exists()
    assert (kept / "keys").is_dir()
    assert (tmp_path / "holiday.jpg").exists()
    create_pod(home, "another", "ada", "box")


def test_a_creation_that_hits_a_full_disk_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"not ours")
    script = (
        "import signal, sys; from pathlib import Path; from node.home import PodHome; "
        "from node.office import create_pod; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"create_pod(PodHome(Path({str(tmp_path)!r})), 'pod', 'ada', 'box')"
    )

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    done = subprocess.run(
        [sys.executable, "-B", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        preexec_fn=small_files,
    )
    assert "UserError: the pod could not be written" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"holiday.jpg", "lock", "models"}
    create_pod(PodHome(tmp_path), "pod", "ada", "box")


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe"])
def test_only_a_missing_note_of_the_database_means_the_default(tmp_path: Path, content: bytes) -> None:
    """Else a node would go on in an old file, under the same key: a fork."""
    home = PodHome(tmp_path)
    assert home.ledger_url == home.default_ledger_url
    (tmp_path / "database").write_bytes(content)
    with pytest.raises(UserError, match="which names the ledger's database"):
        _ = home.ledger_url


def test_a_note_of_the_database_that_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "database").mkdir()
    with pytest.raises(UserError, match="database, cannot be read"):
        _ = PodHome(tmp_path).ledger_url
