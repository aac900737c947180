"""The control transport as the rest of the pod sees it: small requests between nodes that have proven their
keys. Real adapter: `pod/p2p`; in-memory adapter: `memory_control.py`. Who is let in is told to it by
`set_allowed`; it knows no roster. `Desk` is what both adapters share: handlers, limits and refusals.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

MAX_PAYLOAD_BYTES = 1024 * 1024
MAX_KIND_BYTES = 64
MAX_NUM_REQUESTS_AT_ONCE = 64
JOIN_KIND = "join"

Handler = Callable[[bytes, bytes], Awaitable[bytes]]
PeerCallback = Callable[[bytes, bool], None]

log = logging.getLogger("pod.control")


class ControlError(Exception):
    """A request, dial or listen that failed; the message is one line for people."""


class RefusedError(ControlError):
    """The other side answered and said no."""


class ControlTransport(Protocol):
    """Requests to nodes by id. All methods belong to one asyncio loop; a `peer` has proven its key."""

    @property
    def node_id(self) -> bytes: ...

    async def start(self) -> None:
        """Raises ControlError when it cannot listen."""

    async def stop(self) -> None: ...

    def set_allowed(self, nodes: frozenset[bytes], invite_keys: frozenset[bytes]) -> None:
        """Nodes may do everything, invite keys only join; everybody else is refused and cut off at once."""

    def handle(self, kind: str, handler: Handler) -> None: ...

    async def request(self, peer: bytes, kind: str, payload: bytes, timeout_s: float) -> bytes:
        """The answer of a connected peer. Never dials. Raises ControlError (RefusedError: it said no)."""

    def peers(self) -> frozenset[bytes]:
        """The connected nodes."""

    def listen_addresses(self) -> list[str]:
        """Multiaddrs with the own peer id, for others to dial."""

    async def connect(self, peer: bytes, addresses: Sequence[str], timeout_s: float) -> None:
        """Returns when connected. Raises ControlError that lists what was tried."""

    async def disconnect(self, peer: bytes) -> None: ...

    def on_peer(self, callback: PeerCallback) -> None:
        """Called with (node, True) when it is connected and (node, False) when it no longer is."""


class Desk:
    """Answers what peers ask: knows who may ask what; a failing handler harms nothing else."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}
        self._callbacks: list[PeerCallback] = []
        self._num_at_once: Counter[bytes] = Counter()
        self.nodes: frozenset[bytes] = frozenset()
        self.invite_keys: frozenset[bytes] = frozenset()

    def handle(self, kind: str, handler: Handler) -> None:
        assert kind not in self._handlers
        assert len(kind.encode()) <= MAX_KIND_BYTES
        self._handlers[kind] = handler

    def on_peer(self, callback: PeerCallback) -> None:
        self._callbacks.append(callback)

    def tell_peer(self, peer: bytes, up: bool) -> None:
        for callback in self._callbacks:
            callback(peer, up)

    def may_connect(self, peer: bytes) -> bool:
        return peer in self.nodes or peer in self.invite_keys

    async def answer(self, peer: bytes, kind: str, payload: bytes) -> bytes:
        """Raises RefusedError whatever goes wrong."""
        if peer not in self.nodes and not (peer in self.invite_keys and kind == JOIN_KIND):
            raise RefusedError("not a member of this pod")
        handler = self._handlers.get(kind)
        if handler is None:
            raise RefusedError(f"this node does not answer {kind!r}")
        if self._num_at_once[peer] >= MAX_NUM_REQUESTS_AT_ONCE:
            raise RefusedError("too many requests at once")
        self._num_at_once[peer] += 1
        try:
            answer = await handler(peer, payload)
        except ControlError as error:
            raise RefusedError(str(error)) from None
        except Exception:
            log.exception("the handler of %s failed", kind)
            raise RefusedError(f"the request {kind!r} failed there") from None
        finally:
            self._num_at_once[peer] -= 1
            if not self._num_at_once[peer]:
                del self._num_at_once[peer]
        if len(answer) > MAX_PAYLOAD_BYTES:
            raise RefusedError(f"the answer to {kind!r} is too large")
        return answer


def check_request(kind: str, payload: bytes) -> None:
    """Raises ControlError for what no adapter would carry."""
    if len(payload) > MAX_PAYLOAD_BYTES or len(kind.encode()) > MAX_KIND_BYTES:
        raise ControlError(f"a request of {len(payload)} bytes is too large")
