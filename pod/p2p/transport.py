"""ControlTransport over libp2p, on the asyncio side: pairs requests with answers by number and hands incoming
requests to their handlers. The libp2p host lives in its own thread and can crash and come back: what was
asked then fails, connections come back by dialling again, and nothing else notices.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import ParamSpec

from pod.control import (
    ControlError,
    Desk,
    Handler,
    PeerCallback,
    RefusedError,
    check_request,
)
from pod.identity import KeyPair, peer_id
from pod.p2p.frames import ControlFrame, FrameType
from pod.p2p.host import Host, HostEvents
from pod.p2p.link import Link
from pod.p2p.quiet import silence_libp2p
from pod.p2p.thread import HostThread

START_TIMEOUT_S = 15.0

Args = ParamSpec("Args")

log = logging.getLogger("pod.p2p")


class LibP2PControl:
    """One end; implements ControlTransport. `listen`: multiaddrs without peer id; none: dials only."""

    def __init__(self, key: KeyPair, listen: Sequence[str] = ()) -> None:
        self._key = key
        self._listen = list(listen)
        self._desk = Desk()
        self._num_links: dict[bytes, int] = {}
        self._numbers = itertools.count(1)
        self._asked: dict[int, tuple[bytes, asyncio.Future[bytes]]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready: asyncio.Future[list[str]] | None = None
        self._thread: HostThread | None = None

    @property
    def node_id(self) -> bytes:
        return self._key.public

    async def start(self) -> None:
        silence_libp2p()
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._thread = HostThread(self._make_host, self._across(self._on_ready), self._across(self._on_crash))
        self._thread.start()
        try:
            # The port that was free at first is asked for again after a crash.
            self._listen = await asyncio.wait_for(self._ready, START_TIMEOUT_S)
        except (ControlError, TimeoutError) as error:
            await self.stop()
            raise ControlError(str(error) or "the libp2p host did not start") from None

    async def stop(self) -> None:
        if self._thread is not None:
            await asyncio.to_thread(self._thread.stop)
            self._thread = None
        self._on_crash()
        for task in self._answering:
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)

    def set_allowed(self, nodes: frozenset[bytes], invite_keys: frozenset[bytes]) -> None:
        self._desk.nodes, self._desk.invite_keys = nodes, invite_keys
        for peer in [peer for peer in self._num_links if not self._desk.may_connect(peer)]:
            self._on_links(peer, 0)
        self._call(lambda host: host.drop_outsiders())

    def handle(self, kind: str, handler: Handler) -> None:
        self._desk.handle(kind, handler)

    async def request(self, peer: bytes, kind: str, payload: bytes, timeout_s: float) -> bytes:
        check_request(kind, payload)
        if peer not in self._num_links:
            raise ControlError(f"not connected to {peer_id(peer)}")
        number = next(self._numbers)
        answer = asyncio.get_running_loop().create_future()
        self._asked[number] = (peer, answer)
        self._send(peer, ControlFrame(FrameType.REQUEST, number, kind, payload))
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            raise ControlError(f"no answer to {kind!r} within {timeout_s:g} s") from None
        finally:
            self._asked.pop(number, None)

    def peers(self) -> frozenset[bytes]:
        return frozenset(self._num_links) & self._desk.nodes

    def listen_addresses(self) -> list[str]:
        return [f"{address}/p2p/{peer_id(self.node_id)}" for address in self._listen]

    async def connect(self, peer: bytes, addresses: Sequence[str], timeout_s: float) -> None:
        if peer in self._num_links:
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        settle = self._across(lambda error: _settle(done, error))

        async def dial(host: Host) -> None:
            try:
                await host.dial(peer, addresses)
            except ControlError as error:
                settle(error)
            except Exception as error:
                settle(ControlError(f"cannot connect to {peer_id(peer)}: {error!r}"))
            else:
                settle(None)

        assert self._thread is not None
        self._thread.spawn(dial)
        try:
            await asyncio.wait_for(done, timeout_s)
        except TimeoutError:
            tried = ", ".join(addresses) or "no address known"
            raise ControlError(
                f"cannot connect to {peer_id(peer)} within {timeout_s:g} s ({tried})"
            ) from None
        await self._await_link(peer)

    async def disconnect(self, peer: bytes) -> None:
        self._on_links(peer, 0)
        self._call(lambda host: host.drop(peer))

    def on_peer(self, callback: PeerCallback) -> None:
        self._desk.on_peer(callback)

    def crash(self, error: Exception) -> None:
        """For tests and drills: an exception in the libp2p thread, as a bug in libp2p would raise it."""

        def fail(_: Host) -> None:
            raise error

        self._call(fail)

    async def _await_link(self, peer: bytes) -> None:
        """The host's word about a new link crosses right behind the dial's end."""
        for _ in range(100):
            if peer in self._num_links:
                return
            await asyncio.sleep(0.01)
        raise ControlError(f"{peer_id(peer)} hung up at once")

    def _make_host(self) -> Host:
        events = HostEvents(
            on_frame=self._across(self._on_frame),
            on_links=self._across(self._on_links),
            may_connect=self._desk.may_connect,
            is_node=lambda peer: peer in self._desk.nodes,
        )
        return Host(self._key, self._listen, events)

    def _across(self, function: Callable[Args, None]) -> Callable[Args, None]:
        """The same function, to be called from the host's thread."""
        loop = self._loop
        assert loop is not None

        def call(*args: Args.args, **kwargs: Args.kwargs) -> None:
            try:
                loop.call_soon_threadsafe(lambda: function(*args, **kwargs))
            except RuntimeError:
                log.debug("the node's loop has ended")

        return call

    def _call(self, action: Callable[[Host], None]) -> None:
        if self._thread is not None:
            self._thread.call(action)

    def _send(self, peer: bytes, frame: ControlFrame) -> None:
        def send(host: Host) -> None:
            link = host.best_link(peer)
            if link is None or not link.send(frame):
                self._across(self._not_sent)(frame.number)

        self._call(send)

    def _not_sent(self, number: int) -> None:
        peer, answer = self._asked.get(number, (b"", None))
        if answer is not None and not answer.done():
            answer.set_exception(ControlError(f"{peer_id(peer)} does not keep up or is gone"))

    def _on_ready(self, outcome: list[str] | ControlError) -> None:
        assert self._ready is not None
        if self._ready.done():
            return
        if isinstance(outcome, ControlError):
            self._ready.set_exception(outcome)
        else:
            self._ready.set_result(outcome)

    def _on_crash(self) -> None:
        for peer in list(self._num_links):
            self._on_links(peer, 0)

    def _on_links(self, peer: bytes, num_links: int) -> None:
        was_up = peer in self._num_links
        if num_links and self._desk.may_connect(peer):
            self._num_links[peer] = num_links
        elif was_up:
            del self._num_links[peer]
            self._fail_requests_to(peer)
        is_up = peer in self._num_links
        if was_up != is_up and peer not in self._desk.invite_keys:
            self._desk.tell_peer(peer, is_up)

    def _fail_requests_to(self, peer: bytes) -> None:
        for asked, answer in list(self._asked.values()):
            if asked == peer and not answer.done():
                answer.set_exception(ControlError(f"the connection to {peer_id(peer)} was lost"))

    def _on_frame(self, link: Link, frame: ControlFrame) -> None:
        if not self._desk.may_connect(link.peer):
            return
        if frame.type is FrameType.REQUEST:
            task = asyncio.get_running_loop().create_task(self._answer(link, frame))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
            return
        peer, answer = self._asked.get(frame.number, (b"", None))
        if answer is None or answer.done() or peer != link.peer:
            return
        if frame.type is FrameType.ANSWER:
            answer.set_result(frame.payload)
        else:
            answer.set_exception(RefusedError(frame.payload.decode(errors="replace")[:500]))

    async def _answer(self, link: Link, frame: ControlFrame) -> None:
        try:
            payload = await self._desk.answer(link.peer, frame.kind, frame.payload)
            reply = ControlFrame(FrameType.ANSWER, frame.number, "", payload)
        except RefusedError as error:
            reply = ControlFrame(FrameType.REFUSAL, frame.number, "", str(error).encode())
        self._call(lambda _: _reply(link, reply))


def _reply(link: Link, frame: ControlFrame) -> None:
    if not link.send(frame):
        log.debug("an answer could not be sent")


def _settle(done: asyncio.Future[None], error: ControlError | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
