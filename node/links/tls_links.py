"""Stage links over mutual TLS 1.3: one thread watches all sending sockets, one reads each receiving socket.

A peer is cut as a whole: when one connection to it ends, is replaced or falls silent, all end, and the
engine is told once. Knows certificates (through `Trust`) and frames, but no sessions and no roster.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from node.links.codec import FrameError, encode
from node.links.frames import Frame, Lane
from node.links.hello import (
    FRAMES_OF,
    HELLO_BYTES,
    LINK_ID_BYTES,
    Answer,
    Direction,
    Hello,
    HelloError,
    Role,
    answer_to,
    check_answer,
)
from node.links.limits import DEFAULT_LIMITS, LinkLimits
from node.links.port import DownCallback, FrameCallback, LinkCounts, LinkDown
from node.links.tally import Tally
from node.links.tls_socket import TlsSocket
from node.links.trust import Trust
from node.links.watch import Watch
from node.links.wires import Receiver, Sender
from pod.identity import KeyPair, short_name

_CLOSE_TIMEOUT_S = 2.0
# What one read takes from the system: some frames of a decode step, a part of a bulk frame.
_ARRIVED_BYTES = 128 << 10
_PONG_BYTES = 4 << 10
_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Peer:
    """Everything open to one stage or one head."""

    role: Role
    node: bytes
    link: bytes | None = None
    senders: dict[Lane, Sender] = field(default_factory=dict)
    receivers: dict[Lane, Receiver] = field(default_factory=dict)


class _ConnectedMeanwhile(Exception):
    """Another dial to the same node was faster."""


class TlsLinks:
    """The `StageLinks` port on sockets. Listens from the start; trusts nobody until `set_trust`."""

    def __init__(
        self,
        key: KeyPair,
        pod: bytes,
        listen: str,
        on_frame: FrameCallback,
        on_link_down: DownCallback,
        on_head_down: DownCallback,
        limits: LinkLimits = DEFAULT_LIMITS,
    ) -> None:
        """`listen` is host:port, port 0 for any. Raises OSError when it cannot be listened on."""
        self._key = key
        self._pod = pod
        self._limits = limits
        self._on_frame = on_frame
        self._on_down = {Role.STAGE: on_link_down, Role.HEAD: on_head_down}
        self._trust = Trust(key, ())
        self._tally = Tally()
        self._lock = threading.RLock()
        self._peers: dict[tuple[Role, bytes], _Peer] = {}
        self._dial_ended = threading.Condition(self._lock)
        self._dialling: set[tuple[bytes, str]] = set()
        self._greeting: dict[TlsSocket, str] = {}
        self._threads: set[threading.Thread] = set()
        self._closed = False
        listener = _listen(listen)
        host, port = listener.getsockname()[:2]
        self._data_address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._watch = Watch(listener, self._accept, self._tick, limits)
        self._watch.start()

    @property
    def data_address(self) -> str:
        return self._data_address

    def connect(self, peer: bytes, data_address: str, timeout_s: float) -> None:
        if peer not in self._trust.nodes:
            raise LinkDown(f"{short_name(peer)}: its certificate is not in the roster")
        dial = (peer, data_address)
        deadline = time.monotonic() + timeout_s
        with self._dial_ended:
            # Another address may be a false one, and is not worth waiting for.
            if not self._dial_ended.wait_for(lambda: dial not in self._dialling, timeout_s):
                raise LinkDown(f"{short_name(peer)}: still being dialled")
            if self.is_connected(peer):
                return
            self._dialling.add(dial)
        try:
            self._dial_lanes(peer, data_address, deadline)
        finally:
            with self._dial_ended:
                self._dialling.discard(dial)
                self._dial_ended.notify_all()

    def is_connected(self, peer: bytes) -> bool:
        found = self._peers.get((Role.STAGE, peer))
        return found is not None and len(found.senders) == len(Lane)

    def send(self, peer: bytes, frame: Frame, lane: Lane) -> None:
        self._push(self._sender(Role.STAGE, peer, lane), frame)

    def send_to_head(self, head: bytes, frame: Frame) -> None:
        self._push(self._sender(Role.HEAD, head, Lane.DECODE), frame)

    def can_send_bulk(self, peer: bytes) -> bool:
        found = self._peers.get((Role.STAGE, peer))
        sender = found.senders.get(Lane.BULK) if found else None
        return sender is not None and not sender.aborted and sender.has_room()

    def link_us(self, peer: bytes) -> int:
        found = self._peers.get((Role.STAGE, peer))
        sender = found.senders.get(Lane.DECODE) if found else None
        return int(sender.round_trip_s / 2 * 1e6) if sender else 0

    def set_trust(self, certificates: Sequence[bytes]) -> None:
        trust = Trust(self._key, certificates)
        with self._lock:
            self._trust = trust
            removed = [peer for peer in self._peers.values() if peer.node not in trust.nodes]
        for peer in removed:
            self._cut(peer, "no longer in the roster")

    def drop(self, peer: bytes) -> None:
        for role in Role:
            if (found := self._peers.get((role, peer))) is not None:
                self._cut(found, "dropped")

    def counts(self) -> LinkCounts:
        return self._tally.counts()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            peers, threads = list(self._peers.values()), list(self._threads)
        for peer in peers:
            self._cut(peer, "closed")
        self._watch.stop()
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    # -- sending

    def _sender(self, role: Role, node: bytes, lane: Lane) -> Sender:
        found = self._peers.get((role, node))
        sender = found.senders.get(lane) if found else None
        if sender is None:
            raise LinkDown(f"{short_name(node)} is not connected")
        return sender

    def _push(self, sender: Sender, frame: Frame) -> None:
        buffers = encode(frame)
        try:
            if sender.push(buffers):
                self._watch.attend(sender)
        except LinkDown:
            sender.abort()
            raise
        self._tally.add_sent(frame, sum(map(len, buffers)))

    # -- dialling

    def _dial_lanes(self, peer: bytes, data_address: str, deadline: float) -> None:
        link = os.urandom(LINK_ID_BYTES)
        senders: dict[Lane, Sender] = {}
        try:
            for lane in Lane:
                senders[lane] = self._dial(
                    peer,
                    data_address,
                    Hello(self._pod, Role.STAGE, Direction.TO_LISTENER, lane, link),
                    deadline,
                )
            self._adopt_senders(peer, senders)
        except BaseException as error:
            for sender in senders.values():
                sender.close()
            if not isinstance(error, _ConnectedMeanwhile):
                raise

    def _dial(self, peer: bytes, data_address: str, hello: Hello, deadline: float) -> Sender:
        host, _, port = data_address.rpartition(":")
        try:
            raw = socket.create_connection((host.strip("[]"), int(port)), _remaining_s(deadline))
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return self._introduce(peer, raw, hello, deadline)
        except (OSError, OverflowError, ValueError, HelloError, LinkDown) as error:
            raise LinkDown(f"{short_name(peer)} at {data_address}: {error}") from error

    def _introduce(self, peer: bytes, raw: socket.socket, hello: Hello, deadline: float) -> Sender:
        trust = self._trust
        tls = TlsSocket(raw, trust.dialling, False, _PONG_BYTES)
        try:
            if trust.node_of(tls.handshake(deadline)) != peer:
                raise LinkDown("another node answers there")
            if self.is_connected(peer):
                # To greet it once more would make it cut the link that came up meanwhile.
                raise _ConnectedMeanwhile
            tls.write(hello.encode())
            check_answer(tls.read_exactly(1, deadline))
            return Sender(tls, hello.lane, self._limits)
        except BaseException as error:
            tls.close()
            if isinstance(error, ssl.SSLCertVerificationError):
                raise LinkDown("the peer's certificate is not in the roster") from error
            if isinstance(error, ssl.SSLError | ConnectionError):
                raise LinkDown(f"the peer does not admit this node: {error}") from error
            raise

    def _adopt_senders(self, node: bytes, senders: dict[Lane, Sender]) -> None:
        with self._lock:
            self._check_welcome(node)
            if self.is_connected(node):
                raise _ConnectedMeanwhile
            peer = self._peers.setdefault((Role.STAGE, node), _Peer(Role.STAGE, node))
            peer.senders = senders
            for sender in senders.values():
                self._watch.add(sender, partial(self._cut, peer))

    def _check_welcome(self, node: bytes) -> None:
        if self._closed or node not in self._trust.nodes:
            raise LinkDown("closed, or no longer in the roster")

    # -- being dialled

    def _accept(self, raw: socket.socket) -> None:
        """A new connection, from anybody, is greeted on its own thread; at the bounds the oldest that has not
        said yet who it is makes room, because that is hardly the one who just came.
        """
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            address = str(raw.getpeername()[0])
            tls = TlsSocket(raw, self._trust.listening, True, _ARRIVED_BYTES)
        except (OSError, ValueError):
            raw.close()
            return
        with self._lock:
            if self._closed or len(self._threads) >= self._limits.max_num_connections:
                tls.close()
                return
            self._make_room(address)
            self._greeting[tls] = address
            thread = threading.Thread(target=self._serve, args=(tls,), name="link-receiver", daemon=True)
            self._threads.add(thread)
        thread.start()

    def _make_room(self, address: str) -> None:
        same = [tls for tls, other in self._greeting.items() if other == address]
        if len(same) >= self._limits.max_num_handshakes_per_address:
            self._turn_away(same[0])
        elif len(self._greeting) >= self._limits.max_num_handshakes:
            self._turn_away(next(iter(self._greeting)))

    def _turn_away(self, tls: TlsSocket) -> None:
        """Its thread sees the end and closes it."""
        del self._greeting[tls]
        tls.shutdown()

    def _serve(self, tls: TlsSocket) -> None:
        try:
            greeted = self._greet(tls)
            if greeted is not None:
                self._receive(*greeted)
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _greet(self, tls: TlsSocket) -> tuple[_Peer, Receiver] | None:
        deadline = time.monotonic() + self._limits.handshake_timeout_s
        try:
            node = self._trust.node_of(tls.handshake(deadline))
            answer, hello = answer_to(tls.read_exactly(HELLO_BYTES, deadline), self._pod)
            with self._lock:
                self._greeting.pop(tls, None)
            if hello is not None:
                return self._adopt(tls, node, hello)
            tls.write(bytes([answer]))
            self._end_greeting(tls)
        except (OSError, ValueError, HelloError, LinkDown):
            self._end_greeting(tls)
        return None

    def _end_greeting(self, tls: TlsSocket) -> None:
        with self._lock:
            # Before its descriptor can be another's.
            self._greeting.pop(tls, None)
        tls.close()

    def _adopt(self, tls: TlsSocket, node: bytes, hello: Hello) -> tuple[_Peer, Receiver] | None:
        """Make the connection part of its peer before the welcome, so that the dialler finds it complete."""
        welcome = bytes([Answer.WELCOME])
        self._cut_older_links(node, hello)
        with self._lock:
            self._check_welcome(node)
            peer = self._peers.setdefault((hello.role, node), _Peer(hello.role, node))
            if peer.link not in (None, hello.link):
                raise HelloError("dialled twice at once")
            peer.link = hello.link
            if hello.direction is Direction.TO_DIALLER:
                if peer.senders:
                    raise HelloError("opened twice")
                sender = peer.senders[hello.lane] = Sender(tls, hello.lane, self._limits, welcome)
                self._watch.add(sender, partial(self._cut, peer))
                return None
            if hello.lane in peer.receivers:
                raise HelloError("opened twice")
            may_say = FRAMES_OF[hello.role, hello.direction]
            receiver = peer.receivers[hello.lane] = Receiver(tls, hello.lane, self._limits, may_say)
        return peer, receiver

    def _cut_older_links(self, node: bytes, hello: Hello) -> None:
        """A peer that dials anew has lost its older link, even if the end of that has not come here yet."""
        with self._lock:
            old = self._peers.get((hello.role, node))
        if old is not None and old.link not in (None, hello.link):
            self._cut(old, "dialled anew")

    def _receive(self, peer: _Peer, receiver: Receiver) -> None:
        reason = "closed"
        try:
            receiver.write(bytes([Answer.WELCOME]))
            while not receiver.aborted:
                frame, num_bytes = receiver.read()
                self._tally.add_received(frame, num_bytes)
                self._on_frame(peer.node, frame)
                del frame
        except LinkDown as error:
            reason = str(error)
        except FrameError as error:
            reason = f"not a frame: {error}"
        finally:
            self._cut(peer, reason)
            receiver.close()

    # -- losing a peer

    def _tick(self) -> None:
        """A writer of the DECODE lane pings, so one that says nothing is frozen or gone."""
        with self._lock:
            receivers = [(peer, peer.receivers.get(Lane.DECODE)) for peer in self._peers.values()]
        for peer, receiver in receivers:
            if receiver is not None and receiver.is_waiting:
                receiver.num_silent_ticks += 1
                if receiver.num_silent_ticks > self._limits.max_num_silent_ticks:
                    self._cut(peer, "silent")

    def _cut(self, peer: _Peer, reason: str) -> None:
        with self._lock:
            if self._peers.get((peer.role, peer.node)) is not peer:
                return
            del self._peers[peer.role, peer.node]
            wires = [*peer.senders.values(), *peer.receivers.values()]
            closed = self._closed
        for wire in wires:
            wire.abort()
        if closed:
            return
        try:
            self._on_down[peer.role](peer.node, reason)
        except Exception:
            # The thread that noticed watches all the other links too.
            _log.exception("the callback for a lost link failed")


def _remaining_s(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, int(port)), family=family, backlog=128)
