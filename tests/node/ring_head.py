"""A real head over real engines on in-memory links, with a ledger in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import cast

from ledger.entry import HoldOpened, HoldSettled, HoldVoided, decode_entry
from ledger.ledger import MEMORY_URL, Ledger
from ledger.rate_card import DEFAULT_RATE_CARD
from node.gateway.backend import NoRoute, Usage
from node.ledger_thread import LedgerThread
from node.links.frames import Frame, Sampling, Stage
from node.links.head_links import HeadLinks
from node.links.memory_links import MemoryHead
from node.links.subscriptions import Subscription, Subscriptions
from node.sessions.head import Head, SessionRequest
from node.sessions.session import HeadSession
from pod.identity import KeyPair
from tests.engine.ring import POD, Ring
from tests.ledger.world import FakeDirectory, raws

HEAD = KeyPair.of_seed(bytes([254]) * 32)
MEMBER = b"m" * 32


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class RingLinks:
    """`HeadLinks` as the head uses them, over a ring's in-memory network."""

    def __init__(self, ring: Ring) -> None:
        self.subscriptions = Subscriptions()
        loop = asyncio.get_running_loop()
        self._end = MemoryHead(
            ring.network,
            HEAD.public,
            lambda node, frame: loop.call_soon_threadsafe(self.subscriptions.received, node, frame),
            lambda node, reason: loop.call_soon_threadsafe(self.subscriptions.lost, node, reason),
        )

    async def connect(self, node: bytes, address: str, timeout_s: float) -> None:
        self._end.connect(node)

    def subscribe(self, session: bytes) -> Subscription:
        return self.subscriptions.open(session)

    def send(self, node: bytes, frame: Frame) -> None:
        self._end.send(node, frame)


class RingHead:
    """Made inside a running loop. `routes` are tried in order, those over an avoided node left out."""

    def __init__(self, ring: Ring, routes: Sequence[tuple[Stage, ...]] = ()) -> None:
        self.ring = ring
        self.routes = list(routes or [ring.route])
        self.links = RingLinks(ring)
        nodes = [stage.node for route in self.routes for stage in route]
        # Each stage is a member's of its own, so that the books show who earned what.
        members = {node: bytes([number]) * 32 for number, node in enumerate(nodes, 1)}
        directory = FakeDirectory(members={HEAD.public: MEMBER, **members})
        self.ledger = Ledger.open(MEMORY_URL, POD, directory, HEAD.public, HEAD.sign, now_ms)
        self.thread = LedgerThread(self.ledger)
        self.head = Head(
            pod=POD,
            node=HEAD.public,
            sign=HEAD.sign,
            links=cast(HeadLinks, self.links),
            ledger=self.thread,
            find_route=self._find_route,
            clock_ms=now_ms,
        )

    def _find_route(self, model: bytes, avoided: frozenset[bytes]) -> tuple[Stage, ...]:
        for route in self.routes:
            if not avoided & {stage.node for stage in route}:
                return route
        raise NoRoute("no route")

    async def open(self, prompt_ids: Sequence[int], sampling: Sampling) -> HeadSession:
        manifest = self.ring.package.manifest
        request = SessionRequest(MEMBER, bytes(16), manifest.model_id, manifest, tuple(prompt_ids), sampling)
        return await self.head.open(request, DEFAULT_RATE_CARD)

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> tuple[list[int], Usage]:
        return await read_and_settle(await self.open(prompt_ids, sampling))

    def entries(self) -> list[HoldOpened | HoldSettled | HoldVoided]:
        bodies = [decode_entry(raw).body for raw in raws(self.ledger)]
        return [body for body in bodies if isinstance(body, HoldOpened | HoldSettled | HoldVoided)]

    def check_books(self, usages: Sequence[Usage]) -> None:
        """Each hold ended once; the ledger was told what clients were told; every stage was paid for it."""
        entries = self.entries()
        opened = [entry.session for entry in entries if isinstance(entry, HoldOpened)]
        ended = [entry.session for entry in entries if not isinstance(entry, HoldOpened)]
        assert sorted(opened) == sorted(ended)
        assert len(set(opened)) == len(opened)
        assert self.ledger.open_holds() == []
        settled = [entry for entry in entries if isinstance(entry, HoldSettled)]
        for name in ("num_prompt_tokens", "num_cached_tokens", "num_output_tokens"):
            told = sum(getattr(usage, name) for usage in usages)
            assert sum(getattr(entry, name) for entry in settled) == told
            for entry in settled:
                assert {getattr(signed.receipt, name) for signed in entry.receipts} == {getattr(entry, name)}
        assert sum(self.ledger.balances().values()) == 0

    def close(self) -> None:
        self.thread.close()


async def read_and_settle(session: HeadSession) -> tuple[list[int], Usage]:
    tokens = [token.token_id async for token in session.tokens()]
    return tokens, await session.settle(len(tokens))
