"""The head's side of the data plane, on asyncio: a session asks the stages of its route and is answered.

Two connections per stage, both dialled from here: one this side writes, one it reads; each carries one
direction because a stage never reads and writes one TLS object from two threads. They are kept and
shared by all sessions. Knows frames and certificates, not what a session is.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from node.links.codec import PREFIX_BYTES, FrameError, encode, parse_prefix, received
from node.links.frames import Frame, Lane, Ping, Pong
from node.links.hello import FRAMES_OF, LINK_ID_BYTES, Direction, Hello, HelloError, Role, check_answer
from node.links.limits import DEFAULT_LIMITS, LinkLimits
from node.links.port import LinkCounts, LinkDown, LinkFull
from node.links.subscriptions import Subscription, Subscriptions
from node.links.tally import Tally
from node.links.trust import Trust
from pod.identity import KeyPair, short_name

_MAY_SAY_TO_HEAD = FRAMES_OF[Role.HEAD, Direction.TO_DIALLER]
_PONG_ONLY = frozenset({Pong})


@dataclass(eq=False, slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def read_frame(self, may_say: frozenset[type[Frame]]) -> tuple[Frame, int]:
        prefix = parse_prefix(await self.reader.readexactly(PREFIX_BYTES), Lane.DECODE)
        if prefix.frame_type not in may_say:
            raise FrameError(f"a {prefix.frame_type.__name__} has no place on this connection")
        header = await self.reader.readexactly(prefix.header_bytes)
        return received(prefix, header, b""), PREFIX_BYTES + len(header)


class _StageLink:
    """The two connections to one stage and the tasks that read, answer and ping on them."""

    def __init__(
        self,
        asking: _Connection,
        answering: _Connection,
        limits: LinkLimits,
        on_frame: Callable[[Frame, int], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._asking = asking
        self._answering = answering
        self._limits = limits
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._num_silent_ticks = 0
        self._is_up = True
        self._tasks = [asyncio.ensure_future(self._run(job)) for job in (self._read, self._hear, self._tick)]

    def send(self, frame: Frame) -> int:
        """Returns the encoded size. Raises LinkDown or LinkFull."""
        if not self._is_up:
            raise LinkDown("the link is closed")
        num_waiting = self._asking.writer.transport.get_write_buffer_size()
        if num_waiting > self._limits.max_num_queued_bytes[Lane.DECODE]:
            raise LinkFull(f"{num_waiting} bytes wait already")
        buffers = encode(frame)
        self._asking.writer.writelines(buffers)
        return sum(map(len, buffers))

    def cut(self, reason: str) -> None:
        if self._is_up:
            self._is_up = False
            for connection in (self._asking, self._answering):
                connection.writer.transport.abort()
            for task in self._tasks:
                task.cancel()
            self._on_lost(reason)

    async def ended(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, job: Callable[[], Awaitable[None]]) -> None:
        try:
            await job()
        except (OSError, EOFError):
            self.cut("closed by the peer")
        except (FrameError, LinkFull) as error:
            self.cut(str(error))

    async def _read(self) -> None:
        while True:
            frame, num_bytes = await self._answering.read_frame(_MAY_SAY_TO_HEAD)
            if isinstance(frame, Ping):
                self._answering.writer.writelines(encode(Pong(frame.nonce)))
                await self._answering.writer.drain()
            else:
                self._on_frame(frame, num_bytes)

    async def _hear(self) -> None:
        while True:
            await self._asking.read_frame(_PONG_ONLY)
            self._num_silent_ticks = 0

    async def _tick(self) -> None:
        num_ticks = 0
        while self._num_silent_ticks <= self._limits.max_num_silent_ticks:
            await asyncio.sleep(self._limits.tick_s)
            self._num_silent_ticks += 1
            num_ticks += 1
            if num_ticks % self._limits.num_ticks_per_ping == 0:
                self.send(Ping(num_ticks))
        self.cut("no answer to pings")


class HeadLinks:
    """The links of one head to all stages it talks to. Everything happens on the loop it is used from."""

    def __init__(
        self,
        key: KeyPair,
        pod: bytes,
        certificates: Sequence[bytes] = (),
        limits: LinkLimits = DEFAULT_LIMITS,
    ) -> None:
        self._key = key
        self._pod = pod
        self._limits = limits
        self._trust = Trust(key, certificates)
        self._links: dict[bytes, _StageLink] = {}
        self._dialling: dict[bytes, asyncio.Lock] = {}
        self._subscriptions = Subscriptions()
        self._tally = Tally()

    async def connect(self, node: bytes, address: str, timeout_s: float) -> None:
        """Make sure there is a link to that stage. Raises LinkDown with one line that says why not."""
        try:
            async with asyncio.timeout(timeout_s):
                async with self._dialling.setdefault(node, asyncio.Lock()):
                    if node not in self._links:
                        await self._dial(node, address)
        except TimeoutError:
            raise LinkDown(f"{short_name(node)} at {address}: no answer in {timeout_s:g} s") from None
        except ssl.SSLCertVerificationError as error:
            reason = "the peer's certificate is not in the roster"
            raise LinkDown(f"{short_name(node)} at {address}: {reason}") from error
        except (ssl.SSLError, ConnectionResetError) as error:
            reason = f"the peer does not admit this node: {error}"
            raise LinkDown(f"{short_name(node)} at {address}: {reason}") from error
        except (OSError, EOFError, ValueError, OverflowError, HelloError, LinkDown) as error:
            raise LinkDown(f"{short_name(node)} at {address}: {error}") from error

    def is_connected(self, node: bytes) -> bool:
        return node in self._links

    def send(self, node: bytes, frame: Frame) -> None:
        """Queue a frame to a connected stage. Never waits. Raises LinkDown or LinkFull."""
        link = self._links.get(node)
        if link is None:
            raise LinkDown(f"{short_name(node)} is not connected")
        self._tally.add_sent(frame, link.send(frame))

    def subscribe(self, session: bytes) -> Subscription:
        """Everything any stage answers for this session from now on, and each `LinkLost`."""
        return self._subscriptions.open(session)

    def set_trust(self, certificates: Sequence[bytes]) -> None:
        """The certificates (DER) of the current roster's nodes; links to all others are cut at once."""
        self._trust = Trust(self._key, certificates)
        for node in set(self._links) - self._trust.nodes:
            self._links[node].cut("no longer in the roster")

    def counts(self) -> LinkCounts:
        return self._tally.counts()

    async def close(self) -> None:
        links = list(self._links.values())
        for link in links:
            link.cut("closed")
            await link.ended()

    async def _dial(self, node: bytes, address: str) -> None:
        link_id = os.urandom(LINK_ID_BYTES)
        # The answering side first: when a stage can be asked, it can already answer.
        answering = await self._dial_one(node, address, Direction.TO_DIALLER, link_id)
        try:
            asking = await self._dial_one(node, address, Direction.TO_LISTENER, link_id)
        except BaseException:
            answering.writer.transport.abort()
            raise
        if node not in self._trust.nodes:
            answering.writer.transport.abort()
            asking.writer.transport.abort()
            raise LinkDown("no longer in the roster")
        self._links[node] = _StageLink(
            asking,
            answering,
            self._limits,
            lambda frame, num_bytes: self._received(node, frame, num_bytes),
            lambda reason: self._lost(node, reason),
        )

    async def _dial_one(self, node: bytes, address: str, direction: Direction, link_id: bytes) -> _Connection:
        trust = self._trust
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(
            host.strip("[]"), int(port), ssl=trust.dialling, server_hostname=""
        )
        try:
            tls: ssl.SSLObject = writer.get_extra_info("ssl_object")
            if trust.node_of(tls.getpeercert(binary_form=True)) != node:
                raise LinkDown("another node answers there")
            raw_socket: socket.socket = writer.get_extra_info("socket")
            raw_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            writer.write(Hello(self._pod, Role.HEAD, direction, Lane.DECODE, link_id).encode())
            check_answer(await reader.read(1))
        except BaseException:
            writer.transport.abort()
            raise
        return _Connection(reader, writer)

    def _received(self, node: bytes, frame: Frame, num_bytes: int) -> None:
        self._tally.add_received(frame, num_bytes)
        self._subscriptions.received(node, frame)

    def _lost(self, node: bytes, reason: str) -> None:
        with suppress(KeyError):
            del self._links[node]
        self._subscriptions.lost(node, reason)
