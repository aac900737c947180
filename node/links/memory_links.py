"""Stage links without a network: the nodes of a `MemoryNetwork` reach each other inside one process.

Frames pass through the codec and bounded lanes exactly as on a socket, so that a test sees the same
order, counts, limits and losses; there are no certificates to check, only the node ids they carry.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from node.links.codec import PREFIX_BYTES, Buffer, encode, parse_prefix, received
from node.links.frames import Frame, Lane
from node.links.limits import DEFAULT_LIMITS, LinkLimits
from node.links.port import DownCallback, FrameCallback, LinkCounts, LinkDown, LinkFull
from node.links.rows import RowsBudget
from node.links.tally import Tally
from pod.identity import node_of_certificate

_POLL_S = 0.05


class _Pipe:
    """One lane in one direction: a bounded queue and the thread that delivers from it."""

    def __init__(self, lane: Lane, limits: LinkLimits, deliver: Callable[[Frame, int], None]) -> None:
        self._lane = lane
        self._max_num_bytes = limits.max_num_queued_bytes[lane]
        self._budget = RowsBudget(limits.max_num_held_bytes[lane])
        self._deliver = deliver
        self._waiting: deque[list[Buffer]] = deque()
        self._num_bytes = 0
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._run, name=f"memory-link-{lane.name}", daemon=True).start()

    def has_room(self) -> bool:
        return self._num_bytes < self._max_num_bytes

    def push(self, buffers: list[Buffer]) -> None:
        num_bytes = sum(map(len, buffers))
        with self._changed:
            if self._closed:
                raise LinkDown("the link is closed")
            if self._num_bytes >= self._max_num_bytes:
                raise LinkFull(f"{self._num_bytes} bytes wait already")
            self._waiting.append(buffers)
            self._num_bytes += num_bytes
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while (buffers := self._next()) is not None:
            frame, num_bytes = self._rebuild(buffers)
            del buffers
            if not self._closed:
                self._deliver(frame, num_bytes)
            del frame

    def _next(self) -> list[Buffer] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            head = self._waiting[0] if not self._closed else None
        if head is None:
            return None
        num_rows_bytes = len(head[1]) if len(head) > 1 else 0
        while not self._closed and not self._budget.wait(num_rows_bytes, _POLL_S):
            pass
        with self._changed:
            self._waiting.popleft()
            self._num_bytes -= sum(map(len, head))
        return head

    def _rebuild(self, buffers: list[Buffer]) -> tuple[Frame, int]:
        first = memoryview(buffers[0])
        payload: Buffer = b""
        if len(buffers) > 1:
            payload = self._budget.take(len(buffers[1]))
            payload[:] = buffers[1]
        prefix = parse_prefix(first[:PREFIX_BYTES], self._lane)
        return received(prefix, first[PREFIX_BYTES:], payload), len(first) + len(payload)


class MemoryNetwork:
    """Who is there, and which lanes are open between them."""

    def __init__(self, limits: LinkLimits = DEFAULT_LIMITS) -> None:
        self.limits = limits
        self._lock = threading.RLock()
        self._stages: dict[bytes, MemoryLinks] = {}
        self._heads: dict[bytes, MemoryHead] = {}
        self._lanes: dict[tuple[bytes, bytes, Lane], _Pipe] = {}
        self._to_stage: dict[tuple[bytes, bytes], _Pipe] = {}
        self._to_head: dict[tuple[bytes, bytes], _Pipe] = {}

    def add_stage(self, links: MemoryLinks) -> None:
        with self._lock:
            self._stages[links.node] = links

    def add_head(self, head: MemoryHead) -> None:
        with self._lock:
            self._heads[head.node] = head

    def connect_stages(self, source: bytes, target: bytes) -> None:
        with self._lock:
            sender, receiver = self._stages.get(source), self._stages.get(target)
            if sender is None or receiver is None or not (receiver.trusts(source) and sender.trusts(target)):
                raise LinkDown("nobody there, or not in the roster")
            for lane in Lane:
                if (source, target, lane) not in self._lanes:
                    deliver = receiver.receiver_from(source)
                    self._lanes[source, target, lane] = _Pipe(lane, self.limits, deliver)

    def connect_head(self, head: bytes, stage: bytes) -> None:
        with self._lock:
            asking, answering = self._heads.get(head), self._stages.get(stage)
            if asking is None or answering is None or not answering.trusts(head):
                raise LinkDown("nobody there, or not in the roster")
            if (head, stage) not in self._to_stage:
                self._to_stage[head, stage] = _Pipe(Lane.DECODE, self.limits, answering.receiver_from(head))
                self._to_head[stage, head] = _Pipe(Lane.DECODE, self.limits, asking.receiver_from(stage))

    def lane(self, source: bytes, target: bytes, lane: Lane) -> _Pipe | None:
        return self._lanes.get((source, target, lane))

    def to_stage(self, head: bytes, stage: bytes) -> _Pipe | None:
        return self._to_stage.get((head, stage))

    def to_head(self, stage: bytes, head: bytes) -> _Pipe | None:
        return self._to_head.get((stage, head))

    def cut_stages(self, one: bytes, other: bytes, reason: str) -> None:
        with self._lock:
            keys = [(a, b, lane) for a, b in {(one, other), (other, one)} for lane in Lane]
            pipes = [self._lanes.pop(key) for key in keys if key in self._lanes]
            ends = [(self._stages.get(one), other), (self._stages.get(other), one)]
        for pipe in pipes:
            pipe.close()
        for links, peer in ends if pipes else ():
            if links is not None:
                links.on_link_down(peer, reason)

    def cut_head(self, head: bytes, stage: bytes, reason: str) -> None:
        with self._lock:
            pipes = [self._to_stage.pop((head, stage), None), self._to_head.pop((stage, head), None)]
            asking, answering = self._heads.get(head), self._stages.get(stage)
        for pipe in pipes:
            if pipe is None:
                return
            pipe.close()
        if answering is not None:
            answering.on_head_down(head, reason)
        if asking is not None:
            asking.on_lost(stage, reason)

    def cut_all_of_stage(self, node: bytes, reason: str) -> None:
        with self._lock:
            stages = {b if a == node else a for a, b, _ in self._lanes if node in (a, b)}
            heads = {head for head, stage in self._to_stage if stage == node}
        for peer in stages:
            self.cut_stages(node, peer, reason)
        for head in heads:
            self.cut_head(head, node, reason)

    def cut_stages_asked_by(self, head: bytes, reason: str) -> None:
        with self._lock:
            stages = {stage for asking, stage in self._to_stage if asking == head}
        for stage in stages:
            self.cut_head(head, stage, reason)

    def peers_of(self, node: bytes) -> set[bytes]:
        with self._lock:
            stages = {b if a == node else a for a, b, _ in self._lanes if node in (a, b)}
            return stages | {head for head, stage in self._to_stage if stage == node}

    def remove_stage(self, node: bytes) -> None:
        with self._lock:
            self._stages.pop(node, None)

    def remove_head(self, node: bytes) -> None:
        with self._lock:
            self._heads.pop(node, None)


class MemoryLinks:
    """The `StageLinks` port of one stage in a `MemoryNetwork`. Trusts everybody until `set_trust`."""

    def __init__(
        self,
        network: MemoryNetwork,
        node: bytes,
        on_frame: FrameCallback,
        on_link_down: DownCallback,
        on_head_down: DownCallback,
    ) -> None:
        self.node = node
        self.on_link_down = on_link_down
        self.on_head_down = on_head_down
        self._network = network
        self._on_frame = on_frame
        self._trusted: frozenset[bytes] | None = None
        self._tally = Tally()
        network.add_stage(self)

    @property
    def data_address(self) -> str:
        return "memory:0"

    def trusts(self, node: bytes) -> bool:
        return self._trusted is None or node in self._trusted

    def receiver_from(self, peer: bytes) -> Callable[[Frame, int], None]:
        def deliver(frame: Frame, num_bytes: int) -> None:
            self._tally.add_received(frame, num_bytes)
            self._on_frame(peer, frame)

        return deliver

    def connect(self, peer: bytes, data_address: str, timeout_s: float) -> None:
        self._network.connect_stages(self.node, peer)

    def is_connected(self, peer: bytes) -> bool:
        return self._network.lane(self.node, peer, Lane.DECODE) is not None

    def send(self, peer: bytes, frame: Frame, lane: Lane) -> None:
        self._push(self._network.lane(self.node, peer, lane), frame)

    def send_to_head(self, head: bytes, frame: Frame) -> None:
        self._push(self._network.to_head(self.node, head), frame)

    def link_us(self, peer: bytes) -> int:
        return 0

    def can_send_bulk(self, peer: bytes) -> bool:
        pipe = self._network.lane(self.node, peer, Lane.BULK)
        return pipe is not None and pipe.has_room()

    def set_trust(self, certificates: Sequence[bytes]) -> None:
        self._trusted = frozenset(map(node_of_certificate, certificates))
        for peer in self._network.peers_of(self.node) - self._trusted:
            self.drop(peer)

    def drop(self, peer: bytes) -> None:
        self._network.cut_stages(self.node, peer, "dropped")
        self._network.cut_head(peer, self.node, "dropped")

    def counts(self) -> LinkCounts:
        return self._tally.counts()

    def close(self) -> None:
        self._network.remove_stage(self.node)
        self._network.cut_all_of_stage(self.node, "closed by the peer")

    def _push(self, pipe: _Pipe | None, frame: Frame) -> None:
        if pipe is None:
            raise LinkDown("not connected")
        buffers = encode(frame)
        pipe.push(buffers)
        self._tally.add_sent(frame, sum(map(len, buffers)))


class MemoryHead:
    """The head's end in a `MemoryNetwork`: dials stages, sends to them, is called with their answers."""

    def __init__(
        self, network: MemoryNetwork, node: bytes, on_frame: FrameCallback, on_lost: DownCallback
    ) -> None:
        self.node = node
        self.on_lost = on_lost
        self._network = network
        self._on_frame = on_frame
        network.add_head(self)

    def receiver_from(self, stage: bytes) -> Callable[[Frame, int], None]:
        return lambda frame, _: self._on_frame(stage, frame)

    def connect(self, stage: bytes) -> None:
        self._network.connect_head(self.node, stage)

    def send(self, stage: bytes, frame: Frame) -> None:
        pipe = self._network.to_stage(self.node, stage)
        if pipe is None:
            raise LinkDown("not connected")
        pipe.push(encode(frame))

    def close(self) -> None:
        self._network.remove_head(self.node)
        self._network.cut_stages_asked_by(self.node, "closed by the peer")
