"""Counts frames and bytes by type, for tests that hold the cost per token fixed and for metrics."""

from __future__ import annotations

import threading

from node.links.frames import Frame
from node.links.port import FrameCount, LinkCounts


class Tally:
    """Counts of one node's links, safe to add to from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sent: dict[type[Frame], FrameCount] = {}
        self._received: dict[type[Frame], FrameCount] = {}

    def add_sent(self, frame: Frame, num_bytes: int) -> None:
        self._add(self._sent, frame, num_bytes)

    def add_received(self, frame: Frame, num_bytes: int) -> None:
        self._add(self._received, frame, num_bytes)

    def counts(self) -> LinkCounts:
        with self._lock:
            return LinkCounts(dict(self._sent), dict(self._received))

    def _add(self, counts: dict[type[Frame], FrameCount], frame: Frame, num_bytes: int) -> None:
        with self._lock:
            before = counts.get(type(frame), FrameCount())
            counts[type(frame)] = FrameCount(before.num_frames + 1, before.num_bytes + num_bytes)
