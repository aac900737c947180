"""Two stages and a head on either adapter, with everything they hear recorded, for the tests of the links."""

from __future__ import annotations

import asyncio
import threading
import time
from array import array
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from node.links.frames import Dtype, Frame, HiddenBatch, HiddenItem, Lane, OpenSession, Sampling, Stage
from node.links.head_links import HeadLinks
from node.links.limits import DEFAULT_LIMITS, LinkLimits
from node.links.memory_links import MemoryHead, MemoryLinks, MemoryNetwork
from node.links.port import StageLinks
from node.links.subscriptions import LinkLost, Received
from node.links.tls_links import TlsLinks
from pod.identity import KeyPair, certificate

POD = b"p" * 32
SESSION = b"s" * 16
KEYS = [KeyPair.of_seed(bytes([number]) * 32) for number in range(1, 6)]
CERTIFICATES = [certificate(key) for key in KEYS]
ROSTER = CERTIFICATES[:3]
TIMEOUT_S = 5.0
T = TypeVar("T")


def eventually(condition: Callable[[], object], timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.002)


def rows_frame(position: int, num_bytes: int = 64, session: bytes = SESSION) -> HiddenBatch:
    rows = position.to_bytes(4, "big") * (num_bytes // 4)
    return HiddenBatch((HiddenItem(session, position, 1),), Dtype.FLOAT32, num_bytes // 4, rows)


def open_session(head: bytes, session: bytes = SESSION) -> OpenSession:
    route = (Stage(KEYS[0].public, "127.0.0.1:1", 0, 2),)
    prompt_ids = array("I", (1, 2, 3))
    return OpenSession(
        session, b"m" * 32, route, 0, head, b"a" * 32, b"k" * 16, 10, 3, Sampling(), 5, 1, 0, prompt_ids
    )


def position_of(frame: Frame) -> int:
    assert isinstance(frame, HiddenBatch)
    position = frame.items[0].position
    assert frame.rows == position.to_bytes(4, "big") * frame.hidden_size
    return position


class StageEnd:
    """One stage and what it heard. With `keep` it holds on to the frames, and so to their rows."""

    links: StageLinks

    def __init__(self, key: KeyPair) -> None:
        self.node = key.public
        self.frames: list[tuple[bytes, Frame]] = []
        self.positions: list[int] = []
        self.downs: list[tuple[bytes, str]] = []
        self.head_downs: list[tuple[bytes, str]] = []
        self.keep = True

    def on_frame(self, peer: bytes, frame: Frame) -> None:
        if isinstance(frame, HiddenBatch):
            self.positions.append(position_of(frame))
        if self.keep:
            self.frames.append((peer, frame))

    def on_link_down(self, peer: bytes, reason: str) -> None:
        self.downs.append((peer, reason))

    def on_head_down(self, head: bytes, reason: str) -> None:
        self.head_downs.append((head, reason))


class HeadEnd(Protocol):
    node: bytes
    frames: list[tuple[bytes, Frame]]
    lost: list[bytes]

    def connect(self, stage: StageEnd) -> None: ...
    def send(self, stage: StageEnd, frame: Frame) -> None: ...
    def close(self) -> None: ...


class Adapter(Protocol):
    """How a test gets stages and heads that can reach each other."""

    def stage(self, key: KeyPair) -> StageEnd: ...
    def head(self, key: KeyPair) -> HeadEnd: ...
    def close(self) -> None: ...


class MemoryAdapter:
    def __init__(self, limits: LinkLimits = DEFAULT_LIMITS) -> None:
        self._network = MemoryNetwork(limits)
        self._ends: list[StageEnd] = []

    def stage(self, key: KeyPair) -> StageEnd:
        end = StageEnd(key)
        end.links = MemoryLinks(self._network, end.node, end.on_frame, end.on_link_down, end.on_head_down)
        end.links.set_trust(ROSTER)
        self._ends.append(end)
        return end

    def head(self, key: KeyPair) -> HeadEnd:
        return _MemoryHeadEnd(self._network, key)

    def close(self) -> None:
        for end in self._ends:
            end.links.close()


class _MemoryHeadEnd:
    def __init__(self, network: MemoryNetwork, key: KeyPair) -> None:
        self.node = key.public
        self.frames: list[tuple[bytes, Frame]] = []
        self.lost: list[bytes] = []
        self._head = MemoryHead(
            network, key.public, lambda *got: self.frames.append(got), lambda node, _: self.lost.append(node)
        )

    def connect(self, stage: StageEnd) -> None:
        self._head.connect(stage.node)

    def send(self, stage: StageEnd, frame: Frame) -> None:
        self._head.send(stage.node, frame)

    def close(self) -> None:
        self._head.close()


class TlsAdapter:
    def __init__(self, limits: LinkLimits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._ends: list[StageEnd] = []
        self._heads: list[TlsHeadEnd] = []

    def stage(self, key: KeyPair, pod: bytes = POD) -> StageEnd:
        end = StageEnd(key)
        end.links = TlsLinks(
            key, pod, "127.0.0.1:0", end.on_frame, end.on_link_down, end.on_head_down, self._limits
        )
        end.links.set_trust(ROSTER)
        self._ends.append(end)
        return end

    def head(self, key: KeyPair) -> TlsHeadEnd:
        self._heads.append(TlsHeadEnd(key, self._limits))
        return self._heads[-1]

    def close(self) -> None:
        for head in self._heads:
            head.close()
        for end in self._ends:
            end.links.close()


class TlsHeadEnd:
    """`HeadLinks` on a loop of its own thread, subscribed to `SESSION`."""

    def __init__(self, key: KeyPair, limits: LinkLimits) -> None:
        self.node = key.public
        self.frames: list[tuple[bytes, Frame]] = []
        self.lost: list[bytes] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.links = HeadLinks(key, POD, ROSTER, limits)
        self._reading = self.run(self._start_reading())

    async def _start_reading(self) -> asyncio.Task[None]:
        return asyncio.create_task(self._read())

    async def _close(self) -> None:
        await self.links.close()
        self._reading.cancel()
        await asyncio.wait([self._reading])

    async def _read(self) -> None:
        with self.links.subscribe(SESSION) as subscription:
            async for event in subscription:
                match event:
                    case Received(node, frame):
                        self.frames.append((node, frame))
                    case LinkLost(node, _):
                        self.lost.append(node)

    def run(self, job: Coroutine[object, object, T]) -> T:
        return asyncio.run_coroutine_threadsafe(job, self._loop).result(TIMEOUT_S)

    def connect(self, stage: StageEnd) -> None:
        self.connect_to(stage.node, stage.links.data_address)

    def connect_to(self, node: bytes, address: str) -> None:
        self.run(self.links.connect(node, address, TIMEOUT_S))

    def send(self, stage: StageEnd, frame: Frame) -> None:
        async def send() -> None:
            self.links.send(stage.node, frame)

        self.run(send())

    def close(self) -> None:
        if self._loop.is_running():
            self.run(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(TIMEOUT_S)
            self._loop.close()


@contextmanager
def closing(adapter: Adapter) -> Iterator[Adapter]:
    try:
        yield adapter
    finally:
        adapter.close()


def connect(source: StageEnd, target: StageEnd) -> None:
    source.links.connect(target.node, target.links.data_address, TIMEOUT_S)


SMALL_LIMITS = LinkLimits(
    max_num_queued_bytes={Lane.DECODE: 64 << 10, Lane.BULK: 256 << 10},
    max_num_held_bytes={Lane.DECODE: 64 << 10, Lane.BULK: 256 << 10},
    tick_s=0.1,
    handshake_timeout_s=1.0,
    max_num_handshakes=4,
)
