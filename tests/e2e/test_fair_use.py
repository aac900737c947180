"""A pod of real processes with fewer places than its members want: who gets how much.

Each measurement takes at least POD_FAIR_USE_S seconds (default 15) and so many tokens (POD_FAIR_USE_TOKENS,
default 2000) that a request more or less is well within the 10 %, at most MAX_S.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from ledger.entry import TREASURY, Transferred
from ledger.rate_card import DEFAULT_RATE_CARD, MICROCREDITS_PER_CREDIT
from ledger.standing import weight_per_mille
from node.home import PodHome
from node.local_pod import LOOPBACK, LocalNode
from node.office import open_ledger, open_membership, wall_clock_ms
from node.process import join_pod
from node.settings import NodeSettings
from pod.api_key import bearer_text, delegate
from tests.e2e.conftest import MODEL, LocalPod, wait_until

pytestmark = pytest.mark.processes

MIN_S = float(os.environ.get("POD_FAIR_USE_S", "15"))
MIN_NUM_TOKENS = int(os.environ.get("POD_FAIR_USE_TOKENS", "2000"))
MAX_S = MIN_S + 600
# At first everybody gets a request, whatever it weighs.
WARM_UP_TOKENS = 200
NUM_PLACES = 6
NUM_TOKENS = 4
NUM_AT_ONCE = 6
PROMPT = "Once upon a time"
CREDITS = (400, 500, 500, 800, 800, 1100, 1400, 1700, 2000, 2300)


class GreedyNode(LocalNode):
    """Runs `greedy_node.py` in place of the node."""

    def start(self, *arguments: str) -> None:
        command, *rest = arguments
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.greedy_node", command, *LOOPBACK, *rest, "--json"],
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=(self.home.parent / f"{self.member}.log").open("wb"),
            start_new_session=True,
        )


@dataclass
class Member:
    name: str
    id: bytes
    key: str


@dataclass
class FairPod(LocalPod):
    """`nodes[3]` is a gateway that cheats, with no layers; `members` have no machine."""

    members: list[Member] = field(default_factory=list)

    def weights(self) -> dict[str, int]:
        accounts = self.nodes[0].pod("ledger")["accounts"]
        balances = {account["name"]: account["balance_microcredits"] for account in accounts}
        return {m.name: weight_per_mille(balances[m.name], DEFAULT_RATE_CARD) for m in self.members}


def join_without_machine(home: Path, invite: str, name: str) -> Member:
    """In this process; what is left of its node is a key."""
    home.mkdir(mode=0o700)
    settings = NodeSettings("127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0", serve=False)
    join_pod(PodHome(home), invite, name, name, settings)
    membership = open_membership(PodHome(home))
    key, delegation = delegate(
        membership.pod, membership.member_id, membership.member_key.sign, "tests", wall_clock_ms()
    )
    return Member(name, membership.member_id, bearer_text(key, delegation))


def give(home: Path, amounts: dict[bytes, int]) -> None:
    """The owner, whose node is not running, gives of the treasury."""
    membership = open_membership(PodHome(home))
    ledger = open_ledger(PodHome(home), membership)
    for member, amount_microcredits in amounts.items():
        ledger.ledger.append(Transferred(TREASURY, member, amount_microcredits))
    ledger.close()


@pytest.fixture(scope="module")
def fair_pod(tmp_path_factory: pytest.TempPathFactory, packages: Path) -> Iterator[FairPod]:
    directory = tmp_path_factory.mktemp("fair")
    nodes = [LocalNode(name, directory / name) for name in ("ada", "ben", "cleo")]
    nodes.append(GreedyNode("greedy", directory / "greedy"))
    for node in nodes:
        node.home.mkdir(mode=0o700)
        shutil.copytree(packages, node.home / "models")
    options = ("--max-sessions", str(NUM_PLACES), "--no-speculation")
    try:
        nodes[0].pod("create", "fairpod", "--member", "ada", "--node-name", "ada")
        nodes[0].start("up", *options)
        nodes[0].wait_until_up()
        invite = nodes[0].pod("invite", "--uses", "20")["invite"]
        names = [f"m{number}" for number in range(len(CREDITS))]
        members = [join_without_machine(directory / name, invite, name) for name in names]
        nodes[0].stop()
        amounts = [credits * MICROCREDITS_PER_CREDIT for credits in CREDITS]
        give(nodes[0].home, dict(zip((m.id for m in members), amounts, strict=True)))
        nodes[0].start("up", *options)
        nodes[0].wait_until_up()
        invite = nodes[0].pod("invite", "--uses", "3")["invite"]
        for node in nodes[1:]:
            no_serve = ("--no-serve",) if node.member == "greedy" else ()
            node.start(
                "join", invite, "--member", node.member, "--node-name", node.member, *no_serve, *options
            )
        for node in nodes[1:]:
            node.wait_until_up()
        nodes[0].pod("model", "add", MODEL, "--split", "3")
        pod = FairPod(nodes, "", members)
        for index in range(4):
            pod.wait_ready(index, 3)
        wait_until("balances at all nodes", lambda: _agree(pod), 30, 0.5)
        yield pod
    finally:
        for node in nodes:
            node.stop()


def _agree(pod: FairPod) -> bool:
    digests = {node.pod("ledger")["digest"] for node in pod.nodes}
    return len(digests) == 1


@dataclass
class Load:
    """What one member asks for: so many requests at once, at these gateways in turn."""

    member: Member
    gateways: Sequence[int]
    num_at_once: int = NUM_AT_ONCE


async def measure(pod: FairPod, loads: Sequence[Load], min_s: float, min_num_tokens: int) -> Counter[str]:
    """Tokens that each was given, once things were under way."""
    received: Counter[str] = Counter()

    async def ask(client: httpx.AsyncClient, load: Load, number: int) -> None:
        headers = {"authorization": f"Bearer {load.member.key}"}
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        url = f"{pod.nodes[load.gateways[number % len(load.gateways)]].api_url}/v1/completions"
        while True:
            answer = await client.post(url, json=body, headers=headers)
            # Other work on the machine may keep a request waiting for longer than a gateway lets it.
            if answer.status_code != 429:
                assert answer.status_code == 200, answer.text
                received[load.member.name] += answer.json()["usage"]["completion_tokens"]

    async def until(min_s: float, min_num_tokens: int) -> None:
        began_s = time.monotonic()
        while time.monotonic() - began_s < min_s or received.total() < min_num_tokens:
            assert time.monotonic() - began_s < MAX_S, f"too slow: {received}"
            await asyncio.sleep(0.05)

    limits = httpx.Limits(max_connections=1000)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        asking = [
            asyncio.create_task(ask(client, load, number))
            for load in loads
            for number in range(load.num_at_once)
        ]
        try:
            await until(0, min(WARM_UP_TOKENS, min_num_tokens // 5))
            before = received.copy()
            await until(min_s, before.total() + min_num_tokens)
            return received - before
        finally:
            for task in asking:
                task.cancel()
            for result in await asyncio.gather(*asking, return_exceptions=True):
                assert isinstance(result, asyncio.CancelledError), result


def shares(pod: FairPod, loads: Sequence[Load]) -> dict[str, float]:
    """1.0: exactly what the weight says. Balances fall meanwhile: the weight is that of the middle."""
    before = pod.weights()
    received = asyncio.run(measure(pod, loads, MIN_S, MIN_NUM_TOKENS))
    after = pod.weights()
    weights = {load.member.name: before[load.member.name] + after[load.member.name] for load in loads}
    total, total_weight = received.total(), sum(weights.values())
    found = {name: received[name] / total / (weight / total_weight) for name, weight in weights.items()}
    print({name: (received[name], weights[name] // 2, round(share, 3)) for name, share in found.items()})
    return found


def test_one_member_alone_gets_full_speed_whatever_it_weighs(fair_pod: FairPod) -> None:
    poor, rich = fair_pod.members[0], fair_pod.members[-1]
    speeds: dict[str, list[float]] = {poor.name: [], rich.name: []}
    for _ in range(3):
        for member in (poor, rich):
            began_s = time.monotonic()
            received = asyncio.run(measure(fair_pod, [Load(member, (0, 1, 2))], 0, 100))
            speeds[member.name].append(received.total() / (time.monotonic() - began_s))
    print(speeds)
    assert max(speeds[poor.name]) > 0.7 * max(speeds[rich.name]), speeds


def test_tokens_of_a_saturated_pod_follow_the_weights(fair_pod: FairPod) -> None:
    loads = [Load(member, (number % 3,)) for number, member in enumerate(fair_pod.members)]
    found = shares(fair_pod, loads)
    assert all(0.9 < share < 1.1 for share in found.values()), found


def test_a_gateway_that_skips_the_line_gains_nothing(fair_pod: FairPod) -> None:
    """Two members use it, for three times as many requests at once."""
    cheats = {fair_pod.members[2].name, fair_pod.members[7].name}
    loads = [
        Load(member, (3,), 3 * NUM_AT_ONCE) if member.name in cheats else Load(member, (number % 3,))
        for number, member in enumerate(fair_pod.members)
    ]
    weights = fair_pod.weights()
    found = shares(fair_pod, loads)
    gain = sum(found[name] * weights[name] for name in cheats) / sum(weights[name] for name in cheats)
    assert gain < 1.05, found
