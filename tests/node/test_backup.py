"""A backup restored on a second state directory; files and passphrases that are not what they should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from node import backup_file
from node.backup import back_up, restore
from node.backup_file import BackupError, Kind
from node.beside import reading
from node.errors import UserError
from node.home import PodHome
from node.office import create_pod, open_ledger, open_membership
from node.private_file import written_whole
from node.process import join_pod
from node.settings import NodeSettings
from tests.ledger.conftest import postgresql as postgresql
from tests.ledger.postgresql import Cluster

PASSPHRASE = "correct horse battery staple"


@pytest.fixture
def home(tmp_path: Path) -> PodHome:
    made = PodHome(tmp_path / "home")
    create_pod(made, "alpha", "olga", "desk")
    return made


@pytest.fixture(autouse=True)
def cheap_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The strength of scrypt is not what is tested here."""
    monkeypatch.setattr(backup_file, "_SCRYPT_N", 2)


def digest(home: PodHome) -> bytes:
    with closing(open_ledger(home, open_membership(home))) as thread:
        assert thread.ledger.verify() == []
        return thread.ledger.digest()


def names(home: PodHome) -> set[str]:
    return {path.name for path in home.path.iterdir()} if home.path.exists() else set()


def test_a_second_directory_is_the_same_node(home: PodHome, tmp_path: Path) -> None:
    before = digest(home)
    said = back_up(home, tmp_path / "pod.backup", PASSPHRASE)
    assert said["num_entries"] == 2
    assert (tmp_path / "pod.backup").stat().st_mode & 0o077 == 0
    second = PodHome(tmp_path / "second")
    restore(second, tmp_path / "pod.backup", PASSPHRASE, None)
    assert digest(second) == before
    for path in home.identity_files():
        assert (second.path / path.relative_to(home.path)).read_bytes() == path.read_bytes()
    assert (second.keys_dir / "node.pem").stat().st_mode & 0o077 == 0
    assert second.is_restored
    assert "restoring" not in names(second)


def test_a_backup_holds_no_secret_in_the_clear(home: PodHome, tmp_path: Path) -> None:
    back_up(home, tmp_path / "pod.backup", PASSPHRASE)
    sealed = (tmp_path / "pod.backup").read_bytes()
    assert b"PRIVATE KEY" not in sealed
    assert b"olga" not in sealed


def test_from_sqlite_to_postgresql_and_back(home: PodHome, tmp_path: Path, postgresql: Cluster) -> None:
    before = digest(home)
    back_up(home, tmp_path / "first", PASSPHRASE)
    second, third, url = PodHome(tmp_path / "2"), PodHome(tmp_path / "3"), postgresql.new_database()
    restore(second, tmp_path / "first", PASSPHRASE, url)
    assert second.ledger_url == url
    assert digest(second) == before
    back_up(second, tmp_path / "second", PASSPHRASE)
    restore(third, tmp_path / "second", PASSPHRASE, None)
    assert digest(third) == before
    with pytest.raises(UserError, match="holds a ledger already"):
        restore(PodHome(tmp_path / "4"), tmp_path / "first", PASSPHRASE, url)
    assert not PodHome(tmp_path / "4").has_pod()


def test_a_backup_beside_a_node_that_has_the_ledger_open(home: PodHome, tmp_path: Path) -> None:
    with closing(open_ledger(home, open_membership(home))):
        back_up(home, tmp_path / "pod.backup", PASSPHRASE)
    with reading(home) as (_, journal):
        assert journal.num_entries() == 2


def cut(sealed: bytes) -> bytes:
    return sealed[:-1]


def cut_at_a_piece(sealed: bytes) -> bytes:
    head = len(backup_file.MAGIC) + 16
    return sealed[: head + 64 * 1024 + 16]


def changed(sealed: bytes) -> bytes:
    return sealed[:-20] + bytes([sealed[-20] ^ 1]) + sealed[-19:]


@pytest.mark.parametrize(
    ("spoil", "passphrase", "reason"),
    [
        (bytes, "another passphrase", "the passphrase is wrong, or the backup is damaged"),
        (cut, PASSPHRASE, "damaged or cut short"),
        (cut_at_a_piece, PASSPHRASE, "is wrong, or the backup is damaged|damaged or cut short"),
        (changed, PASSPHRASE, "damaged or cut short"),
        (lambda _: b"", PASSPHRASE, "is no backup of gpu-pod"),
        (lambda _: b"SQLite format 3\0" * 100, PASSPHRASE, "is no backup of gpu-pod"),
        (lambda sealed: sealed.replace(b"backup 1", b"backup 2"), PASSPHRASE, "another version"),
        (lambda sealed: sealed[:20], PASSPHRASE, "cut short"),
    ],
)
def test_what_is_not_a_whole_backup_is_one_line_and_writes_nothing(
    home: PodHome, tmp_path: Path, spoil: object, passphrase: str, reason: str
) -> None:
    # Longer than one piece.
    (home.path / "peers.json").write_text(json.dumps(["x" * 70_000]))
    back_up(home, tmp_path / "pod.backup", PASSPHRASE)
    (tmp_path / "pod.backup").write_bytes(spoil((tmp_path / "pod.backup").read_bytes()))  # type: ignore[operator]
    second = PodHome(tmp_path / "second")
    with pytest.raises(UserError, match=reason) as caught:
        restore(second, tmp_path / "pod.backup", passphrase, None)
    assert len(str(caught.value).splitlines()) == 1
    assert names(second) <= {"lock", "models"}


def test_a_file_from_elsewhere_is_not_written_outside(tmp_path: Path) -> None:
    """Whoever knows the passphrase can seal anything; the names in it are not trusted."""
    with (tmp_path / "evil").open("wb") as file:
        backup_file.write(file, PASSPHRASE, [(Kind.FILE, b"../../evil.txt\0owned")])
    with pytest.raises(UserError, match="holds a file of the name"):
        restore(PodHome(tmp_path / "a" / "second"), tmp_path / "evil", PASSPHRASE, None)
    assert not (tmp_path / "evil.txt").exists()


def test_a_restore_into_a_pod_is_refused(home: PodHome, tmp_path: Path) -> None:
    back_up(home, tmp_path / "pod.backup", PASSPHRASE)
    before = digest(home)
    with pytest.raises(UserError, match="is in a pod already"):
        restore(home, tmp_path / "pod.backup", PASSPHRASE, None)
    assert digest(home) == before


def test_a_short_passphrase_and_a_place_that_cannot_be_written(home: PodHome, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 8 characters"):
        back_up(home, tmp_path / "pod.backup", "short")
    with pytest.raises(UserError, match="cannot write"):
        back_up(home, tmp_path / "nowhere" / "pod.backup", PASSPHRASE)
    assert not list(tmp_path.glob("pod.backup*"))


def test_records_of_any_length_come_back(tmp_path: Path) -> None:
    records = [(Kind.ENTRY, bytes([number % 256]) * number * 997) for number in range(0, 300, 7)]
    with (tmp_path / "file").open("wb") as file:
        backup_file.write(file, PASSPHRASE, records)
    with (tmp_path / "file").open("rb") as file:
        assert list(backup_file.read(file, PASSPHRASE)) == records
    with (tmp_path / "file").open("rb") as file, pytest.raises(BackupError):
        list(backup_file.read(file, PASSPHRASE + " "))


def test_the_commands(home: PodHome, tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_text(PASSPHRASE + "\n")

    def pod(at: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "node",
            *arguments,
            "--passphrase-file",
            str(tmp_path / "passphrase"),
        ]
        return subprocess.run(
            [*command, "--json"],
            capture_output=True,
            text=True,
            env=os.environ | {"POD_HOME": str(at)},
            timeout=60,
            check=False,
        )

    made = json.loads(pod(home.path, "backup", str(tmp_path / "pod.backup")).stdout)
    assert (made["pod_name"], made["num_entries"]) == ("alpha", 2)
    restored = json.loads(pod(tmp_path / "second", "restore", str(tmp_path / "pod.backup")).stdout)
    assert restored["num_entries"] == 2
    again = pod(tmp_path / "second", "restore", str(tmp_path / "pod.backup"))
    assert again.returncode == 1
    assert "is in a pod already" in again.stderr


def test_files_of_others_among_the_keys_are_left_out(home: PodHome, tmp_path: Path) -> None:
    for name in (".DS_Store", "node.pem~"):
        (home.keys_dir / name).write_bytes(b"not ours")
    back_up(home, tmp_path / "pod.backup", PASSPHRASE)
    second = PodHome(tmp_path / "second")
    restore(second, tmp_path / "pod.backup", PASSPHRASE, None)
    kept = {path.name for path in second.keys_dir.iterdir()}
    assert kept == {path.name for path in home.keys_dir.iterdir()} - {".DS_Store", "node.pem~"}


def test_what_a_killed_process_of_the_same_id_left_is_no_hindrance(tmp_path: Path) -> None:
    """In a container every node has the same process id."""
    (tmp_path / f"https.pem.{os.getpid()}.new").write_bytes(b"half a file")
    with written_whole(tmp_path / "https.pem") as file:
        file.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["https.pem"]
    assert (tmp_path / "https.pem").read_bytes() == b"whole"


SETTINGS = NodeSettings("127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0", serve=False)


@pytest.mark.parametrize(
    "command",
    [
        lambda home, backup: create_pod(home, "second", "mia", "box"),
        lambda home, backup: restore(home, backup, PASSPHRASE, None),
        lambda home, backup: join_pod(home, "pod:nothing", "mia", "box", SETTINGS),
    ],
)
def test_who_comes_second_leaves_the_pod_of_the_first(
    home: PodHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[[PodHome, Path], object]
) -> None:
    back_up(home, tmp_path / "pod.backup", PASSPHRASE)
    shared = tmp_path / "shared"
    acquire = PodHome.acquire

    def late(self: PodHome) -> None:
        """Another command was faster."""
        monkeypatch.setattr(PodHome, "acquire", acquire)
        create_pod(PodHome(shared), "first", "mia", "box")
        acquire(self)

    monkeypatch.setattr(PodHome, "acquire", late)
    with pytest.raises(UserError, match="is in a pod already"):
        command(PodHome(shared), tmp_path / "pod.backup")
    assert open_membership(PodHome(shared)).roster.name == "first"
    PodHome(shared).acquire()
