"""Each mistake gives one clear line, a non-zero exit, no traceback, and changes nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from node.models.reference import resolve
from tests.e2e.conftest import LocalPod

pytestmark = pytest.mark.processes


def pod_command(home: Path, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("POD_")}
    return subprocess.run(
        [sys.executable, "-m", "node", *arguments],
        env=environment | {"POD_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode not in (0, None), done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def content(home: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(home)): path.read_bytes()
        for path in sorted(home.rglob("*"))
        if path.is_file() and path.name not in {"lock", "digests.json"} and "ledger.sqlite" not in path.name
    }


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A fresh pod whose node does not run."""
    done = pod_command(tmp_path / "home", "create", "testpod", "--member", "ada")
    assert done.returncode == 0, done.stderr
    return tmp_path / "home"


def test_no_pod_yet(tmp_path: Path) -> None:
    for command in (
        ["up"],
        ["status"],
        ["invite"],
        ["key", "create"],
        ["model", "ls"],
        ["chat"],
        ["ledger", "verify"],
    ):
        assert_refused(pod_command(tmp_path / "none", *command), "pod create")


def test_a_second_pod_in_one_directory(home: Path) -> None:
    before = content(home)
    assert_refused(pod_command(home, "create", "another"), "already")
    assert_refused(pod_command(home, "join", "pod-invite-x"), "already")
    assert content(home) == before


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        ("no-such-model", ("unknown model",)),
        ("./missing.gguf", ("there is no file",)),
        ("some/where-unknown", ("some/where-unknown",)),
    ],
)
def test_unknown_model_reference(home: Path, ref: str, words: tuple[str, ...]) -> None:
    before = content(home)
    assert_refused(pod_command(home, "model", "add", ref), *words)
    assert content(home) == before


def test_damaged_weights(home: Path, tmp_path: Path) -> None:
    whole = resolve("smollm2-135m").weights[0].read_bytes()
    (tmp_path / "truncated.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "garbage.gguf").write_bytes(b"GGUF" + b"\xff" * 4096)
    (tmp_path / "empty").mkdir()
    before = content(home)
    assert_refused(pod_command(home, "model", "add", str(tmp_path / "truncated.gguf")), "truncated.gguf")
    assert_refused(pod_command(home, "model", "add", str(tmp_path / "garbage.gguf")), "garbage.gguf")
    assert_refused(pod_command(home, "model", "add", str(tmp_path / "empty")), "config.json")
    assert content(home) == before


def test_bad_options(home: Path) -> None:
    assert_refused(pod_command(home, "up", "--api", "nonsense"), "HOST:PORT")
    assert_refused(pod_command(home, "up", "--memory", "lots"), "8GiB")
    assert_refused(pod_command(home, "up", "--device", "quantum"), "--device")
    assert_refused(pod_command(home, "invite", "--expires", "soon"), "24h")
    assert_refused(pod_command(home, "invite", "--role", "king"), "role")
    assert_refused(pod_command(home, "model", "add", "smollm2-135m", "--dtype", "int3"), "dtype")
    assert_refused(pod_command(home, "model", "rm", "nothing"), "nothing")
    assert_refused(pod_command(home, "key", "revoke", "nothing"), "nothing")
    assert_refused(pod_command(home, "key", "create", "--cap", "-1"), "--cap", "whole credits")
    assert_refused(pod_command(home, "key", "create", "--rpm", "0"), "--rpm")
    assert_refused(pod_command(home, "key", "create", "--models", "gpt-9"), "gpt-9")
    assert_refused(pod_command(home, "members", "remove", "nobody"), "nobody")


@pytest.mark.parametrize("option", ["--api", "--listen", "--data"])
def test_port_taken(home: Path, option: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        addresses = dict.fromkeys(("--api", "--listen", "--data"), "127.0.0.1:0")
        addresses[option] = f"127.0.0.1:{taken.getsockname()[1]}"
        arguments = [word for pair in addresses.items() for word in pair]
        assert_refused(pod_command(home, "up", *arguments), "port", str(taken.getsockname()[1]), "taken")


def test_home_in_use(pod: LocalPod) -> None:
    free = ("--api", "127.0.0.1:0", "--listen", "127.0.0.1:0", "--data", "127.0.0.1:0")
    assert_refused(pod_command(pod.nodes[0].home, "up", *free), "in use")


def test_invites_say_why_they_are_refused(pod: LocalPod, tmp_path: Path) -> None:
    free = ("--api", "127.0.0.1:0", "--listen", "127.0.0.1:0", "--data", "127.0.0.1:0")

    def join(invite: str) -> subprocess.CompletedProcess[str]:
        done = pod_command(tmp_path / "joiner", "join", invite, *free)
        assert not (tmp_path / "joiner" / "roster.log").exists()
        return done

    good = pod.nodes[0].pod("invite")
    changed = good["invite"][:-6] + ("x" if good["invite"][-6] != "x" else "y") + good["invite"][-5:]
    assert_refused(join("hello"), "pod-invite-")
    assert_refused(join(changed), "damaged")
    pod.nodes[0].pod("invite", "--revoke", good["invite_id"])
    assert_refused(join(good["invite"]), "revoked")


def test_a_used_and_an_expired_invite(pod: LocalPod, tmp_path: Path) -> None:
    free = ("--api", "127.0.0.1:0", "--listen", "127.0.0.1:0", "--data", "127.0.0.1:0", "--no-serve")
    invite = pod.nodes[0].pod("invite", "--expires", "2s")
    import time

    time.sleep(2.1)
    assert_refused(pod_command(tmp_path / "late", "join", invite["invite"], *free), "expired")


def test_an_unreachable_pod_lists_what_was_tried(home: Path, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    made = pod_command(home, "invite", "--advertise", "127.0.0.1", "--listen", f"127.0.0.1:{port}", "--json")
    invite = json.loads(made.stdout)["invite"]
    done = pod_command(
        tmp_path / "joiner",
        "join",
        invite,
        "--api",
        "127.0.0.1:0",
        "--listen",
        "127.0.0.1:0",
        "--data",
        "127.0.0.1:0",
    )
    assert_refused(done, "127.0.0.1", str(port))


def test_json_errors_are_objects(tmp_path: Path) -> None:
    done = pod_command(tmp_path / "none", "status", "--json")
    assert done.returncode == 1
    assert "pod create" in json.loads(done.stdout)["error"]["message"]
