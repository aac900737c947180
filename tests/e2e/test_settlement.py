"""One meter, and streams that clients cut: what was delivered is what is charged, whoever is asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from ledger.entry import HoldSettled, HoldVoided
from node.local_pod import LocalNode
from pod.api_key import bearer_text, delegate
from pod.identity import KeyPair
from tests.e2e.conftest import MODEL, LocalPod, start_pod, stop_pod, wait_until
from tests.e2e.journals import Told, sessions_of

pytestmark = pytest.mark.processes

NUM_CUT_STREAMS = 200
NUM_AT_ONCE = 24
SEED = 4
MAX_NUM_TOKENS = 40


@pytest.fixture(scope="module")
def fresh_pod(tmp_path_factory: pytest.TempPathFactory, packages: Path) -> Iterator[LocalPod]:
    """Of its own: its counters start at nothing."""
    started = start_pod(tmp_path_factory.mktemp("settlement"), packages)
    yield started
    stop_pod(started)


def agreed_books(pod: LocalPod, timeout_s: float = 20) -> list[Any]:
    """Once nothing is open and all nodes hold the same entries."""

    def agreed() -> Any:
        books = [node.pod("ledger") for node in pod.nodes]
        is_quiet = not any(b["num_open_holds"] for b in books)
        return books if is_quiet and len({b["digest"] for b in books}) == 1 else None

    return wait_until("all nodes hold the same entries, and no hold is open", agreed, timeout_s, 0.3)


# One meter.


@dataclass
class Counts:
    prompt: int = 0
    cached: int = 0
    output: int = 0

    def add(self, usage: Mapping[str, Any]) -> None:
        self.prompt += usage["prompt_tokens"]
        self.cached += usage["prompt_tokens_details"]["cached_tokens"]
        self.output += usage["completion_tokens"]


def ask(node: LocalNode, key: str, **more: Any) -> Mapping[str, Any]:
    """One request; the usage that the client was told last."""
    body = {"model": MODEL, "max_tokens": 12, "temperature": 0.8, "seed": 3} | more
    if body.get("stream"):
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=node.api_url, headers=headers, timeout=120) as client:
        if not body.get("stream"):
            usage: Mapping[str, Any] = (
                client.post("/v1/completions", json=body).raise_for_status().json()["usage"]
            )
            return usage
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line for line in answer.iter_lines() if line.startswith("data: {")]
        last: Mapping[str, Any] = json.loads(lines[-1].removeprefix("data: "))
    counted: Mapping[str, Any] = last["usage"]
    return counted


def metric(text: str, name: str, **labels: str) -> int:
    label_text = ",".join(f'{label}="{value}"' for label, value in labels.items())
    found = re.search(rf"^{name}{{{re.escape(label_text)}}} (\S+)$", text, re.MULTILINE)
    assert found, f"no {name} for {labels}"
    return int(float(found[1]))


def cells(page: str, label: str) -> list[str]:
    """One column of the dashboard, row by row."""
    pattern = rf'data-label="{label}"[^>]*><span class="value">(.*?)</span>'
    return [value.replace(",", "") for value in re.findall(pattern, page)]


def test_everybody_shows_the_same_integers(fresh_pod: LocalPod) -> None:
    """The usage a client was told, receipts, settlements, `/metrics`, `pod ledger` and the dashboard."""
    node = fresh_pod.nodes[0]
    long_prompt = "The quick brown fox jumps over the lazy dog. " * 12
    told = Counts()
    usages = [
        ask(node, fresh_pod.key, **request)
        for request in (
            {"prompt": "Once upon a time", "stream": True},
            {"prompt": "Once upon a time"},
            {"prompt": long_prompt, "stream": True, "temperature": 0},
            # The same again: most of it is in the caches, and a guess or two comes true.
            {"prompt": long_prompt, "stream": True, "temperature": 0, "max_tokens": 90},
            {"prompt": "One, two, three,", "stop": ["five", "5"], "temperature": 0, "stream": True},
            {"prompt": ["Red", "Green", "Blue"], "max_tokens": 3},
        )
    ]
    for usage in usages:
        told.add(usage)
    assert told.cached > 0
    books = agreed_books(fresh_pod)

    for other in fresh_pod.nodes:
        sessions = sessions_of(other.home)
        settled = [ending for session in sessions.values() for ending in session.endings]
        assert len(settled) == len(sessions) == 8
        assert all(isinstance(ending, HoldSettled) for ending in settled)
        assert told == Counts(
            sum(ending.num_prompt_tokens for ending in settled if isinstance(ending, HoldSettled)),
            sum(ending.num_cached_tokens for ending in settled if isinstance(ending, HoldSettled)),
            sum(ending.num_output_tokens for ending in settled if isinstance(ending, HoldSettled)),
        )
        for session in sessions.values():
            (ending,) = session.endings
            assert isinstance(ending, HoldSettled)
            counts = ending.num_prompt_tokens, ending.num_cached_tokens, ending.num_output_tokens
            assert [
                (receipt.num_prompt_tokens, receipt.num_cached_tokens, receipt.num_output_tokens)
                for receipt in session.receipts
            ] == [counts] * 3

    metrics = httpx.get(f"{node.api_url}/metrics").text
    assert metric(metrics, "pod_prompt_tokens_total", model=MODEL) == told.prompt
    assert metric(metrics, "pod_output_tokens_total", model=MODEL) == told.output

    recent = books[0]["recent"]
    assert sum(row["num_prompt_tokens"] for row in recent) == told.prompt
    assert sum(row["num_output_tokens"] for row in recent) == told.output
    members = [account for account in books[0]["accounts"] if account["role"]]
    by_name = {account["name"]: account for account in members}
    assert by_name[node.member]["num_consumed_tokens"] == told.prompt + told.output
    # A token that three stages served is served three times.
    assert sum(account["num_served_tokens"] for account in members) == 3 * (told.prompt + told.output)
    assert sum(row["amount_microcredits"] for row in recent) == by_name[node.member]["spent_microcredits"]
    for name, account in by_name.items():
        assert metric(metrics, "pod_consumed_tokens", account=name) == account["num_consumed_tokens"]
        assert metric(metrics, "pod_served_tokens", account=name) == account["num_served_tokens"]
        assert metric(metrics, "pod_balance_microcredits", account=name) == account["balance_microcredits"]

    page = httpx.get(f"{node.api_url}/").text
    assert cells(page, "Prompt") == [str(row["num_prompt_tokens"]) for row in recent]
    assert cells(page, "Output") == [str(row["num_output_tokens"]) for row in recent]
    assert cells(page, "Consumed") == [str(account["num_consumed_tokens"]) for account in members]
    assert cells(page, "Served") == [str(account["num_served_tokens"]) for account in members]


# Streams that are cut.


@dataclass
class Cut:
    """One stream. Polite: it says that it will send no more and reads on, so that it sees all that was sent.

    `num_read` is the last count of tokens that reached the client.
    """

    node: LocalNode
    key: str
    is_polite: bool
    after_s: float | None
    after_num_events: int | None
    num_read: int = 0
    is_whole: bool = False

    async def run(self) -> None:
        address = urlsplit(self.node.api_url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        body = {
            "model": MODEL,
            "prompt": "Once upon a time there was",
            "max_tokens": MAX_NUM_TOKENS,
            "temperature": 0.9,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {address.netloc}\r\nauthorization: Bearer {self.key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
        )
        writer.write(head.encode() + content)
        # A read or write on a connection that the node has closed may fail in several ways; all are an end.
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.after_s):
                    await self._read(reader, self.after_num_events)
            if self.is_polite and not self.is_whole:
                writer.write_eof()
                await self._read(reader, None)
        writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader, num_events: int | None) -> None:
        """Until so many events have come, or the end."""
        while num_events is None or num_events > 0:
            line = await reader.readline()
            if not line:
                return
            if line.startswith(b"data: {"):
                usage = json.loads(line.removeprefix(b"data: ")).get("usage")
                self.num_read = max(self.num_read, usage["completion_tokens"])
                num_events = num_events - 1 if num_events is not None else None
            self.is_whole |= line.startswith(b"data: [DONE]")


def make_cuts(pod: LocalPod) -> dict[bytes, Cut]:
    """By key id: every stream has an API key of its own, which its hold names."""
    rng = random.Random(SEED)
    cuts: dict[bytes, Cut] = {}
    pod_id = bytes.fromhex(pod.nodes[0].pod("status")["pod"]["id"])
    for number in range(NUM_CUT_STREAMS):
        member, node = pod.nodes[number % 3], pod.nodes[rng.randrange(3)]
        member_key = KeyPair.load(member.home / "keys" / "member.pem")
        key, delegation = delegate(
            pod_id,
            member_key.public,
            member_key.sign,
            f"cut {number}",
            time.time_ns() // 1_000_000,
        )
        by_time = rng.random() < 0.5
        cuts[delegation.key_id] = Cut(
            node,
            bearer_text(key, delegation),
            is_polite=rng.random() < 0.7,
            after_s=rng.uniform(0, 4) if by_time else None,
            after_num_events=None if by_time else rng.randrange(1, MAX_NUM_TOKENS),
        )
    return cuts


def charged_tokens(told: Told) -> int:
    """Of one session, and all who were paid for it were paid for as much."""
    (ending,) = told.endings
    assert not told.claims
    if isinstance(ending, HoldVoided):
        return 0
    assert [receipt.num_output_tokens for receipt in told.receipts] == [ending.num_output_tokens] * 3
    assert {receipt.num_prompt_tokens for receipt in told.receipts} == {ending.num_prompt_tokens}
    return ending.num_output_tokens


def test_cut_streams_are_charged_at_what_was_delivered(fresh_pod: LocalPod) -> None:
    cuts = make_cuts(fresh_pod)

    async def run_all() -> None:
        places = asyncio.Semaphore(NUM_AT_ONCE)

        async def run(cut: Cut) -> None:
            async with places, asyncio.timeout(120):
                await cut.run()

        async with asyncio.TaskGroup() as group:
            for cut in cuts.values():
                group.create_task(run(cut))

    asyncio.run(run_all())
    books = agreed_books(fresh_pod, 40)
    assert [b["sum_microcredits"] for b in books] == [0, 0, 0]
    for node in fresh_pod.nodes:
        charged = dict.fromkeys(cuts, 0)
        for told in sessions_of(node.home).values():
            assert told.opened is not None
            if told.opened.key_id in charged:
                charged[told.opened.key_id] += charged_tokens(told)
        polite = {key: cut.num_read for key, cut in cuts.items() if cut.is_polite or cut.is_whole}
        assert {key: charged[key] for key in polite} == polite
        # Who hangs up does not see what was on its way: it may have been sent more than it has read.
        assert all(cut.num_read <= charged[key] <= MAX_NUM_TOKENS for key, cut in cuts.items())
    _all_meters_agree(fresh_pod, books[0])
    num_whole = sum(cut.is_whole for cut in cuts.values())
    num_unread = sum(cut.num_read == 0 for cut in cuts.values())
    # How many, is a matter of the machine; but there were enough of each kind.
    assert num_whole < 0.6 * NUM_CUT_STREAMS
    assert 0 < num_unread < 0.75 * NUM_CUT_STREAMS


def _all_meters_agree(pod: LocalPod, books: Any) -> None:
    """Of everything that was ever asked: what gateways counted, what was settled, what members consumed."""
    settled = [
        ending
        for told in sessions_of(pod.nodes[0].home).values()
        for ending in told.endings
        if isinstance(ending, HoldSettled)
    ]
    num_prompt_tokens = sum(ending.num_prompt_tokens for ending in settled)
    num_output_tokens = sum(ending.num_output_tokens for ending in settled)
    pages = [httpx.get(f"{node.api_url}/metrics").text for node in pod.nodes]
    assert sum(metric(page, "pod_prompt_tokens_total", model=MODEL) for page in pages) == num_prompt_tokens
    assert sum(metric(page, "pod_output_tokens_total", model=MODEL) for page in pages) == num_output_tokens
    consumed = sum(account.get("num_consumed_tokens", 0) for account in books["accounts"])
    assert consumed == num_prompt_tokens + num_output_tokens
