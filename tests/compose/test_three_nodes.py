"""What docker-compose.yml does, without containers: the entry script for three nodes as plain processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from openai import APIError, OpenAI

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
READY_TIMEOUT_S = 150.0
STOP_TIMEOUT_S = 30.0
MODEL = "smollm2-135m"


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(taken.getsockname()[1]) for taken in sockets]
    for taken in sockets:
        taken.close()
    return ports


def wait_until(what: str, check: Callable[[], bool], logs: Path, timeout_s: float = READY_TIMEOUT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > deadline_s:
            told = "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in sorted(logs.glob("*.log")))
            pytest.fail(f"not within {timeout_s} s: {what}\n{told}")
        time.sleep(0.2)


@dataclass
class Node:
    """One service of the compose file, run here: same settings, loopback addresses instead of names."""

    name: str
    directory: Path
    settings: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("POD_")}
        return kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **self.settings}

    @property
    def api_url(self) -> str:
        return f"http://{self.settings['POD_API']}"

    def start(self) -> None:
        with (self.directory / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["/bin/sh", ROOT / "docker" / "entry.sh"], env=self.environment, stdout=log, stderr=log
            )

    def is_healthy(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / f"{self.name}.log").read_text()[-1500:]
        command = ["/bin/sh", ROOT / "docker" / "healthy.sh"]
        return subprocess.run(command, env=self.environment, capture_output=True, timeout=20).returncode == 0

    def pod(self, *arguments: str) -> Any:
        done = subprocess.run(
            ["pod", *arguments, "--json"], env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def stop(self, sent: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(sent)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


def defaults(text: str) -> str:
    """`${NAME:-default}` as Compose reads it when NAME is not set."""
    start, mark, rest = text.partition(":-")
    return rest.removesuffix("}") if mark and start.startswith("${") else text


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    directory = tmp_path_factory.mktemp("compose")
    made: list[Node] = []
    for name, service in yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"].items():
        settings = {key: defaults(value) for key, value in service["environment"].items()}
        settings = {
            key: value.replace("/invites/", f"{directory}/invites/") for key, value in settings.items()
        }
        api, listen, data = (f"127.0.0.1:{port}" for port in free_ports(3))
        addresses = {"POD_API": api, "POD_LISTEN": listen, "POD_DATA": data, "POD_ADVERTISE": "127.0.0.1"}
        home = {"POD_HOME": str(directory / name), "OMP_NUM_THREADS": "1", "POD_MEMORY": "1GiB"}
        (directory / "invites" / name).mkdir(parents=True)
        made.append(Node(name, directory, settings | addresses | home))
    made[0].start()
    try:
        wait_until("node1 healthy", made[0].is_healthy, directory)
        for node in made[1:]:
            node.start()
        for node in made[1:]:
            wait_until(f"{node.name} healthy", node.is_healthy, directory)
        yield made
    finally:
        for node in made:
            if node.process is not None and node.process.poll() is None:
                node.stop()


def wait_for_route(node: Node, num_stages: int) -> None:
    def is_ready() -> bool:
        rows = [row for row in node.pod("status")["models"] if row["name"] == MODEL]
        return any(row["state"] == "ready" and row["num_stages"] >= num_stages for row in rows)

    wait_until(f"{MODEL} over {num_stages} stages at {node.name}", is_ready, node.directory)


def ask(node: Node, key: str) -> str:
    client = OpenAI(base_url=f"{node.api_url}/v1", api_key=key, max_retries=0, timeout=60)
    question = {"role": "user", "content": "What is the capital of France?"}
    answer = client.chat.completions.create(model=MODEL, messages=[question], temperature=0, max_tokens=12)
    return answer.choices[0].message.content or ""


def answers(node: Node, key: str) -> bool:
    try:
        return "Paris" in ask(node, key)
    except APIError:
        return False


def test_the_pod_forms_by_itself_and_answers_also_after_a_restart(nodes: list[Node]) -> None:
    wait_for_route(nodes[2], num_stages=3)
    assert sorted(row["name"] for row in nodes[1].pod("members")["members"]) == ["ada", "ben", "cleo"]
    key = nodes[0].pod("key", "create", "--name", "test")["key"]
    for node in nodes:
        assert "Paris" in ask(node, key)

    identities = [row["name"] for row in nodes[0].pod("status")["nodes"]]
    for node in (nodes[0], nodes[2]):
        assert node.stop() == 0, "a node that is told to stop ends well"
        node.start()
    for node in nodes:
        wait_until(f"{node.name} healthy again", node.is_healthy, node.directory)
    # While layers are still loading a request is refused; it must not stay so.
    wait_until("an answer after the restart", lambda: answers(nodes[1], key), nodes[1].directory)
    assert [row["name"] for row in nodes[1].pod("status")["nodes"]] == identities
