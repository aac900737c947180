"""The entry script against a stand-in for `pod`: which commands it runs, in which order, and how often."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ENTRY = Path(__file__).parents[2] / "docker" / "entry.sh"
FAKE_POD = Path(__file__).with_name("fake_pod.sh")
TIMEOUT_S = 20.0


@dataclass
class Machine:
    """One machine that the script runs on: its directories and its environment."""

    directory: Path
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.directory / "home"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
            "POD_HOME": str(self.home),
            "FAKE_POD_CALLS": str(self.directory / "calls"),
            **self.settings,
        }

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/sh", ENTRY, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["/bin/sh", ENTRY],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell cannot trap a signal that was ignored when it started, as in a background job it is.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def calls(self) -> list[str]:
        """What `pod` was called with since the last look."""
        path = self.directory / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "bin").mkdir()
    shutil.copy(FAKE_POD, tmp_path / "bin" / "pod")
    return Machine(tmp_path)


def creator_settings(directory: Path) -> dict[str, str]:
    return {
        "POD_NAME": "team",
        "POD_MEMBER": "ada",
        "POD_INVITE_FILES": f"{directory / 'invite-ben'} {directory / 'invite-cleo'}",
        "POD_MODEL": "smollm2-135m",
        "POD_SPLIT": "3",
    }


INVITE = "invite --uses 1 --expires 24h"


def test_the_first_start_creates_and_every_other_only_runs(machine: Machine) -> None:
    machine.settings = creator_settings(machine.directory)
    assert machine.run().returncode == 0
    assert machine.calls() == [
        "create team --member ada",
        INVITE,
        INVITE,
        "model add smollm2-135m --split 3",
        "up",
    ]
    assert machine.run().returncode == 0
    assert machine.calls() == ["up"]


def test_an_invite_is_for_its_reader_only(machine: Machine) -> None:
    machine.settings = creator_settings(machine.directory)
    done = machine.run()
    for name in ("invite-ben", "invite-cleo"):
        path = machine.directory / name
        assert path.read_text() == "pod-invite-for-test\n"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "pod-invite" not in done.stdout + done.stderr, "an invite must not end up in the logs"


def test_a_step_that_failed_is_tried_again_and_only_that(machine: Machine) -> None:
    machine.settings = creator_settings(machine.directory) | {"FAKE_POD_MODEL_FAILS": "1"}
    done = machine.run()
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "no such model"
    assert "up" not in machine.calls()
    del machine.settings["FAKE_POD_MODEL_FAILS"]
    assert machine.run().returncode == 0
    assert machine.calls() == ["model add smollm2-135m --split 3", "up"]


def test_without_a_model_and_invites_only_the_pod_is_created(machine: Machine) -> None:
    machine.settings = {"POD_NAME": "team", "POD_MEMBER": "ada"}
    assert machine.run().returncode == 0
    assert machine.calls() == ["create team --member ada", "up"]


def test_join_waits_for_its_invite_then_only_runs(machine: Machine) -> None:
    invite = machine.directory / "invite"
    machine.settings = {"POD_INVITE_FILE": str(invite), "POD_MEMBER": "ben"}
    process = machine.start()
    assert process.poll() is None
    (machine.directory / "invite.new").write_text("pod-invite-abc\n")
    (machine.directory / "invite.new").rename(invite)
    assert process.wait(TIMEOUT_S) == 0
    process.communicate()
    assert machine.calls() == ["join pod-invite-abc --member ben"]
    invite.unlink()
    assert machine.run().returncode == 0
    assert machine.calls() == ["up"]


def test_join_with_an_invite_from_the_environment(machine: Machine) -> None:
    machine.settings = {"POD_INVITE": "pod-invite-xyz", "POD_MEMBER": "ben"}
    assert machine.run().returncode == 0
    assert machine.calls() == ["join pod-invite-xyz --member ben"]


def test_arguments_are_run_instead(machine: Machine) -> None:
    assert machine.run("pod", "members").returncode == 0
    assert machine.calls() == ["members"]


BAD = {
    "no home": ({"POD_HOME": ""}, "set POD_HOME"),
    "no name": ({"POD_INVITE": "x"}, "set POD_MEMBER"),
    "nothing to do": ({"POD_MEMBER": "ada"}, "set POD_NAME to create a pod"),
    "no invite in time": (
        {"POD_MEMBER": "ben", "POD_INVITE_FILE": "/nonexistent", "POD_INVITE_WAIT_S": "0"},
        "no invite in /nonexistent after 0 s",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_missing_settings_are_named_in_one_line(machine: Machine, case: str) -> None:
    settings, message = BAD[case]
    machine.settings = settings
    done = machine.run()
    assert done.returncode == 1
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert machine.calls() == []


def test_the_node_takes_the_place_of_the_script(machine: Machine) -> None:
    """So that it gets the container's signals itself."""
    machine.settings = {"POD_NAME": "team", "POD_MEMBER": "ada"}
    process = machine.start()
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert f"up as process {process.pid}" in output


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_an_invite(machine: Machine, sent: signal.Signals) -> None:
    # The wait is seen to have begun by the script's child process: `sleep`.
    machine.settings = {"POD_INVITE_FILE": str(machine.directory / "invite"), "POD_MEMBER": "ben"}
    process = machine.start()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline_s = time.monotonic() + TIMEOUT_S
    while not children.read_text() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    process.send_signal(sent)
    assert process.wait(TIMEOUT_S) == 143
    process.communicate()
    assert machine.calls() == []
