"""Pulling: all that can be had is had, and nobody makes a node ask too much or too often."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from pod.canonical import encode
from pod.control import Handler, PeerCallback
from pod.gossip import MAX_NUM_PIECES, NOT_ASKED_AGAIN_S, Gossip
from tests.pod.waiting import until

PEER = bytes(32)


@dataclass
class Wire:
    """One end of a control transport; what a pull gets is the test's to say."""

    answer: Callable[[], Awaitable[bytes]]
    node_id: bytes = b"\1" * 32
    num_pulls: int = 0
    handlers: dict[str, Handler] = field(default_factory=dict)

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def set_allowed(self, nodes: frozenset[bytes], invite_keys: frozenset[bytes]) -> None: ...

    def handle(self, kind: str, handler: Handler) -> None:
        self.handlers[kind] = handler

    async def request(self, peer: bytes, kind: str, payload: bytes, timeout_s: float) -> bytes:
        if kind != "pull":
            return encode({})
        self.num_pulls += 1
        return await self.answer()

    def peers(self) -> frozenset[bytes]:
        return frozenset({PEER})

    def listen_addresses(self) -> list[str]:
        return []

    async def connect(self, peer: bytes, addresses: Sequence[str], timeout_s: float) -> None: ...

    async def disconnect(self, peer: bytes) -> None: ...

    def on_peer(self, callback: PeerCallback) -> None: ...

    async def beat(self, digest: int) -> None:
        await self.handlers["beat"](PEER, encode({"notes": digest.to_bytes(8, "big")}))


@dataclass
class Notes:
    """A channel of which the first pieces are refused; refusing one is told in the summary."""

    num_refused_first: int = 0
    name: str = "notes"
    num_pieces: int = 0

    def digest(self) -> bytes:
        return self.num_pieces.to_bytes(8, "little")

    def summary(self) -> bytes:
        return self.num_pieces.to_bytes(8, "big")

    def missing(self, summary: bytes) -> tuple[bytes, bool]:
        return b"", False

    async def ingest(self, peer: bytes, payload: bytes) -> int:
        if payload == b"senseless":
            raise ValueError("senseless")
        self.num_pieces += payload != b"nothing"
        return int(self.num_pieces > self.num_refused_first)


def play(wire: Wire, notes: Notes, scenario: Callable[[Gossip, list[float]], Awaitable[None]]) -> None:
    async def whole() -> None:
        clock = [100.0]
        gossip = Gossip(wire, lambda _: True, "notes", lambda: clock[0])
        gossip.add(notes)
        try:
            await asyncio.wait_for(scenario(gossip, clock), 10)
        finally:
            await gossip.stop()

    asyncio.run(whole())


def idle(gossip: Gossip) -> bool:
    return not gossip._pulls


def test_a_pull_goes_on_behind_pieces_of_which_everything_is_refused() -> None:
    notes = Notes(num_refused_first=3)

    async def answer() -> bytes:
        return b"\1piece" if notes.num_pieces < 5 else b"\0piece"

    async def scenario(gossip: Gossip, clock: list[float]) -> None:
        await wire.beat(999)
        await until(lambda: notes.num_pieces == 6)

    wire = Wire(answer)
    play(wire, notes, scenario)


def test_a_peer_that_always_has_more_is_asked_a_limited_number_of_times_and_not_at_all_for_nothing() -> None:
    kind = b"piece"

    async def answer() -> bytes:
        return b"\1" + kind

    async def scenario(gossip: Gossip, clock: list[float]) -> None:
        nonlocal kind
        await wire.beat(10**9)
        await until(lambda: idle(gossip))
        assert wire.num_pulls == MAX_NUM_PIECES
        kind = b"nothing"
        await wire.beat(10**9)
        await wire.beat(10**9)
        await until(lambda: idle(gossip))
        assert wire.num_pulls == MAX_NUM_PIECES + 1

    wire = Wire(answer)
    play(wire, Notes(), scenario)


def test_many_heartbeats_make_one_pull_and_one_that_follows() -> None:
    go_on = asyncio.Event()

    async def answer() -> bytes:
        await go_on.wait()
        return b"\0nothing"

    async def scenario(gossip: Gossip, clock: list[float]) -> None:
        for digest in range(1, 200):
            await wire.beat(digest)
        await until(lambda: wire.num_pulls == 1)
        assert len(gossip._tasks) == 1
        go_on.set()
        await until(lambda: idle(gossip))
        assert wire.num_pulls == 2

    wire = Wire(answer)
    play(wire, Notes(), scenario)


def test_who_sent_bytes_without_sense_is_not_asked_again_for_a_while() -> None:
    async def answer() -> bytes:
        return b"\1senseless"

    async def scenario(gossip: Gossip, clock: list[float]) -> None:
        for digest in range(1, 20):
            await wire.beat(digest)
            await until(lambda: idle(gossip))
        assert wire.num_pulls == 1
        clock[0] += NOT_ASKED_AGAIN_S
        await wire.beat(20)
        await until(lambda: idle(gossip))
        assert wire.num_pulls == 2

    wire = Wire(answer)
    play(wire, Notes(), scenario)
