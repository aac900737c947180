"""Pods of real node processes on this machine, started for a benchmark and asked through the OpenAI API.

What users have: gateway, ledger, sessions and links are all in the figures. Optional relays in front of the
stage links stand for a slow network.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from benchmarks.client import Endpoint, complete_all
from benchmarks.peers.serve_lines import timeline
from benchmarks.relay import Conditions, relayed
from node.local_pod import LocalNode

MODEL = "smollm2-135m"
READY_TIMEOUT_S = 180.0


@dataclass
class Node(LocalNode):
    """A node with so many threads and further options of `pod up` or `pod join`."""

    num_threads: int = 1
    options: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        return super().environment() | {"OMP_NUM_THREADS": str(self.num_threads)} | self.variables

    def engine(self) -> psutil.Process:
        """Its engine process."""
        assert self.process is not None
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if "node.engine" in child.cmdline():
                return child
        raise RuntimeError(f"{self.member}'s node has no engine process")


@dataclass(frozen=True, slots=True)
class Pod:
    nodes: list[Node]
    endpoint: Endpoint

    def decode(self, prompts: list[list[int]], num_tokens: int, temperature: float = 0.0) -> dict[str, float]:
        """As the peers answer: `first_s` and `tokens_per_s` of all streams together."""
        streams = complete_all(self.endpoint, prompts, num_tokens, temperature)
        seen = timeline(min(stream.sent_s for stream in streams), [stream.times for stream in streams])
        # An event is a piece of text: not always one token.
        num_events = sum(len(stream.times) for stream in streams)
        return seen | {"tokens_per_s": seen["tokens_per_s"] * num_tokens * len(streams) / num_events}


@contextlib.contextmanager
def pod(
    num_nodes: int,
    num_threads: int,
    delay_s: float | None = None,
    speculation: bool = False,
    options: tuple[str, ...] = (),
    variables: dict[str, str] | None = None,
    model_options: tuple[str, ...] = (),
) -> Iterator[Pod]:
    """`num_nodes` nodes that share the model's layers; with `delay_s` each stage link takes that one way.

    Speculation is off unless asked for: no peer has it on, and how much it helps depends on the text.
    """
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        nodes = []
        for number in range(num_nodes):
            own = options + (() if speculation else ("--no-speculation",))
            if delay_s is not None:
                own += _behind_a_relay(stack, delay_s)
            node = Node(
                f"node{number}",
                home / f"node{number}",
                num_threads=num_threads,
                options=own,
                variables=variables or {},
            )
            node.home.mkdir()
            stack.callback(node.stop)
            nodes.append(node)
        _start(nodes, model_options)
        yield Pod(nodes, _endpoint(nodes[0]))


def _behind_a_relay(stack: contextlib.ExitStack, delay_s: float) -> tuple[str, ...]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        data_address = f"127.0.0.1:{free.getsockname()[1]}"
    relay_address = stack.enter_context(relayed(data_address, Conditions(delay_s=delay_s)))
    return ("--data", data_address, "--advertise-data", relay_address)


def _start(nodes: list[Node], model_options: tuple[str, ...]) -> None:
    first = nodes[0]
    first.pod("create", "benchmark", "--member", first.member)
    first.start("up", *first.options)
    first.wait_until_up()
    for node in nodes[1:]:
        invite = first.pod("invite")["invite"]
        node.start("join", invite, "--member", node.member, *node.options)
        node.wait_until_up()
    first.pod("model", "add", MODEL, "--split", str(len(nodes)), *model_options)
    wait_until_ready(first, len(nodes))


def wait_until_ready(node: LocalNode, num_stages: int) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        models = node.pod("status")["models"]
        if models and models[0]["state"] == "ready" and models[0]["num_stages"] == num_stages:
            return
        time.sleep(0.3)
    state = f"{models[0]['state']} {models[0]['reason']}" if models else "no model"
    raise TimeoutError(
        f"{MODEL} not ready over {num_stages} in {READY_TIMEOUT_S:.0f} s: {state}; {_log(node)}"
    )


def _log(node: LocalNode) -> str:
    """The last line that it logged."""
    lines = (node.home.parent / f"{node.member}.log").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _endpoint(node: LocalNode) -> Endpoint:
    address = urlsplit(node.api_url)
    assert address.hostname is not None
    assert address.port is not None
    return Endpoint(address.hostname, address.port, node.pod("key", "create")["key"], MODEL)


def num_cores() -> int:
    return os.cpu_count() or 1
