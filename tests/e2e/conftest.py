"""A real pod of three members on loopback: real processes, real sockets, a real model split three ways."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from node.local_pod import LocalNode
from node.models.package import build_package

MODEL = "smollm2-135m"
READY_TIMEOUT_S = 120.0


def wait_until(what: str, check: Callable[[], Any], timeout_s: float, every_s: float = 0.1) -> Any:
    """Poll `check` until it returns something true; fail naming `what` and the last value."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > deadline_s:
            pytest.fail(f"not in {timeout_s} s: {what} (last: {value!r})")
        time.sleep(every_s)


@dataclass
class LocalPod:
    """`nodes[0]` is the creator's; `key` was made there."""

    nodes: list[LocalNode]
    key: str

    def client(self, index: int, key: str | None = None, **options: Any) -> OpenAI:
        options = {"max_retries": 0, "timeout": 120.0} | options
        return OpenAI(base_url=f"{self.nodes[index].api_url}/v1", api_key=key or self.key, **options)

    def model_row(self, index: int, name: str = MODEL) -> Any:
        status = self.nodes[index].pod("status")
        return next((row for row in status["models"] if row["name"] == name), None)

    def wait_ready(self, index: int, num_stages: int = 3, name: str = MODEL) -> None:
        def is_ready() -> bool:
            row = self.model_row(index, name)
            return row is not None and row["state"] == "ready" and row["num_stages"] >= num_stages

        wait_until(f"{name} ready at node {index}", is_ready, READY_TIMEOUT_S, 0.3)


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's package, made once: describing a GGUF file takes seconds."""
    directory = tmp_path_factory.mktemp("packages") / "models"
    build_package(MODEL, "auto", directory)
    return directory


def start_pod(
    directory: Path,
    packages: Path,
    members: tuple[str, ...] = ("ada", "ben", "cleo"),
    model: str | None = MODEL,
) -> LocalPod:
    nodes = []
    for member in members:
        (directory / member).mkdir(mode=0o700)
        shutil.copytree(packages, directory / member / "models")
        nodes.append(LocalNode(member, directory / member))
    nodes[0].pod("create", "testpod", "--member", members[0], "--node-name", members[0])
    nodes[0].start("up")
    nodes[0].wait_until_up()
    invite = nodes[0].pod("invite", "--uses", str(len(nodes)))["invite"]
    for node in nodes[1:]:
        node.start("join", invite, "--member", node.member, "--node-name", node.member)
    for node in nodes[1:]:
        node.wait_until_up()
    if model is not None:
        nodes[0].pod("model", "add", model, "--split", str(len(members)))
    pod = LocalPod(nodes, nodes[0].pod("key", "create", "--name", "tests")["key"])
    if model is not None:
        for index in range(len(nodes)):
            pod.wait_ready(index, len(members))
    return pod


def stop_pod(pod: LocalPod) -> None:
    for node in pod.nodes:
        node.stop()


@pytest.fixture(scope="session")
def pod(tmp_path_factory: pytest.TempPathFactory, packages: Path) -> Iterator[LocalPod]:
    """One pod for all tests that leave it whole."""
    started = start_pod(tmp_path_factory.mktemp("pod"), packages)
    yield started
    stop_pod(started)


@pytest.fixture(scope="session")
def mortal_pod(tmp_path_factory: pytest.TempPathFactory, packages: Path) -> Iterator[LocalPod]:
    """One pod for the tests that kill nodes (and bring them back), and last of all for the removal."""
    started = start_pod(tmp_path_factory.mktemp("mortal"), packages)
    yield started
    stop_pod(started)
