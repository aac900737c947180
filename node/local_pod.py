"""Node processes on this machine, each with its own state directory, driven by the `pod` command itself.

Used by the demo and by the tests that need real processes. Knows how to start, ask and stop a node; nothing
of what it does.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from node.errors import UserError

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 15.0
COMMAND_TIMEOUT_S = 120.0
# Nodes that share one machine leave its cores to serving.
LOOPBACK = (
    *("--api", "127.0.0.1:0", "--listen", "127.0.0.1:0", "--data", "127.0.0.1:0"),
    *("--no-discover", "--no-compile"),
)


@dataclass
class LocalNode:
    """One node process and the directory it lives in."""

    member: str
    home: Path
    process: subprocess.Popen[bytes] | None = None
    api_url: str = ""

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("POD_")}
        return kept | {"POD_HOME": str(self.home), "OMP_NUM_THREADS": kept.get("OMP_NUM_THREADS", "1")}

    def pod(self, *arguments: str) -> Any:
        """Run one `pod` command with --json and return its result."""
        command = [sys.executable, "-m", "node", *arguments, "--json"]
        done = subprocess.run(  # noqa: S603 - our own program, fixed arguments
            command,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise UserError(
                f"`pod {arguments[0]}` at {self.member}'s node failed: {done.stderr.strip()[-500:]}"
            )
        return json.loads(done.stdout)

    def start(self, *arguments: str) -> None:
        """Start a foreground command (`up` or `join`) on free loopback ports; options of the caller win."""
        command, *rest = arguments
        self.process = subprocess.Popen(  # noqa: S603 - our own program, fixed arguments
            [sys.executable, "-m", "node", command, *LOOPBACK, *rest, "--json"],
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=(self.home.parent / f"{self.member}.log").open("wb"),
            start_new_session=True,
        )

    def wait_until_up(self) -> None:
        """Read the one line that the node prints when its API listens."""
        assert self.process is not None
        line = _read_line(self.process, START_TIMEOUT_S)
        said = json.loads(line) if line else {}
        if "api_url" not in said:
            log = (self.home.parent / f"{self.member}.log").read_text().strip()
            raise UserError(f"{self.member}'s node did not start: {log[-500:]}")
        self.api_url = str(said["api_url"])

    def stop(self) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(STOP_TIMEOUT_S)
        if self.process.stdout is not None:
            self.process.stdout.close()


def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() if selector.select(timeout_s) else b""
