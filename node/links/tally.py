"""Counts frames and bytes by type, for tests that hold the cost per token fixed and for metrics."""

from __future__ import annotations

import threading

from node.links.frames import Frame
from node.links.port import FrameCount, LinkCounts


class Tally:
    """Counts of one node's links, safe to add to from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sent: dict[type[Frame], list[int]] = {}
        self._received: dict[type[Frame], list[int]] = {}

    def add_sent(self, frame: Frame, num_bytes: int) -> None:
        self._add(self._sent, frame, num_bytes)

    def add_received(self, frame: Frame, num_bytes: int) -> None:
        self._add(self._received, frame, num_bytes)

    def counts(self) -> LinkCounts:
        with self._lock:
            return LinkCounts(_frozen(self._sent), _frozen(self._received))

    def _add(self, counts: dict[type[Frame], list[int]], frame: Frame, num_bytes: int) -> None:
        with self._lock:
            count = counts.setdefault(type(frame), [0, 0])
            count[0] += 1
            count[1] += num_bytes


def _frozen(counts: dict[type[Frame], list[int]]) -> dict[type[Frame], FrameCount]:
    return {frame_type: FrameCount(*count) for frame_type, count in counts.items()}
