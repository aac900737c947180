"""The control transport in memory: a `MemoryNetwork` of nodes of one process, with partitions, for tests and
simulations. It refuses outsiders and cuts off removed nodes as the real one does, without any keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from pod.control import ControlError, Desk, Handler, PeerCallback, RefusedError, check_request
from pod.identity import peer_id


class MemoryNetwork:
    """Who is reachable: every started node unless a partition lies between the two."""

    def __init__(self) -> None:
        self.started: dict[bytes, MemoryControl] = {}
        self._sides: tuple[frozenset[bytes], ...] = ()

    def partition(self, *sides: frozenset[bytes]) -> None:
        """Nodes on different sides lose each other at once; a node in no side reaches all. No sides: heal."""
        self._sides = sides
        for node in list(self.started.values()):
            node.drop_unreachable()

    def reaches(self, one: bytes, other: bytes) -> bool:
        if one not in self.started or other not in self.started:
            return False
        sides = [side for side in self._sides if one in side or other in side]
        return len(sides) < 2


class MemoryControl:
    """One node's end; implements ControlTransport."""

    def __init__(self, network: MemoryNetwork, node_id: bytes) -> None:
        self._network = network
        self._node_id = node_id
        self._desk = Desk()
        self._connected: set[bytes] = set()

    @property
    def node_id(self) -> bytes:
        return self._node_id

    async def start(self) -> None:
        if self._node_id in self._network.started:
            raise ControlError("the address is in use")
        self._network.started[self._node_id] = self

    async def stop(self) -> None:
        self.drop_where(lambda _: True)
        self._network.started.pop(self._node_id, None)

    def set_allowed(self, nodes: frozenset[bytes], invite_keys: frozenset[bytes]) -> None:
        self._desk.nodes, self._desk.invite_keys = nodes, invite_keys
        self.drop_where(lambda peer: not self._desk.may_connect(peer))

    def handle(self, kind: str, handler: Handler) -> None:
        self._desk.handle(kind, handler)

    async def request(self, peer: bytes, kind: str, payload: bytes, timeout_s: float) -> bytes:
        check_request(kind, payload)
        other = self._network.started.get(peer)
        if peer not in self._connected or other is None:
            raise ControlError(f"not connected to {peer_id(peer)}")
        answer = asyncio.ensure_future(other._desk.answer(self._node_id, kind, payload))
        try:
            return await asyncio.wait_for(asyncio.shield(answer), timeout_s)
        except TimeoutError:
            # Abandoned, not cancelled: over a network the other side would go on, too.
            answer.add_done_callback(lambda task: task.exception())
            raise ControlError(f"no answer to {kind!r} within {timeout_s:g} s") from None

    def peers(self) -> frozenset[bytes]:
        return frozenset(self._connected & self._desk.nodes)

    def listen_addresses(self) -> list[str]:
        # Only the peer id in it means anything here.
        return [f"/ip4/127.0.0.1/tcp/1/p2p/{peer_id(self._node_id)}"]

    async def connect(self, peer: bytes, addresses: Sequence[str], timeout_s: float) -> None:
        if peer in self._connected:
            return
        tried = ", ".join(addresses) or "no address known"
        if not self._network.reaches(self._node_id, peer):
            raise ControlError(f"cannot reach {peer_id(peer)} (tried {tried})")
        other = self._network.started[peer]
        if not other._desk.may_connect(self._node_id):
            raise RefusedError(f"{peer_id(peer)} did not let this key in (tried {tried})")
        self._set(peer, up=True)
        other._set(self._node_id, up=True)

    async def disconnect(self, peer: bytes) -> None:
        self._drop(peer)

    def on_peer(self, callback: PeerCallback) -> None:
        self._desk.on_peer(callback)

    def drop_unreachable(self) -> None:
        self.drop_where(lambda peer: not self._network.reaches(self._node_id, peer))

    def drop_where(self, unwanted: Callable[[bytes], bool]) -> None:
        for peer in [peer for peer in self._connected if unwanted(peer)]:
            self._drop(peer)

    def _drop(self, peer: bytes) -> None:
        self._set(peer, up=False)
        other = self._network.started.get(peer)
        if other is not None:
            other._set(self._node_id, up=False)

    def _set(self, peer: bytes, up: bool) -> None:
        if up == (peer in self._connected):
            return
        (self._connected.add if up else self._connected.discard)(peer)
        if peer not in self._desk.invite_keys:
            self._desk.tell_peer(peer, up)
