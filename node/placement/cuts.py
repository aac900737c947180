"""Cutting one model into stages: what a layer range weighs, how long it takes, where to cut for given seats.

All arithmetic is in integers (bytes and nanoseconds), so every machine finds the same cuts. It knows one
model and an ordered list of seats; which nodes sit on them, and why, is decided elsewhere.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from node.placement.assignment import Assignment
from node.placement.view import DeployedModel

NS_PER_SECOND = 1_000_000_000
PRECISION = 1000
"""The search for the shortest slowest stage ends within a 1/PRECISION of it."""


@dataclass(frozen=True, slots=True)
class Seat:
    """A node's room for one model: its memory without what other models hold there."""

    node: bytes
    free_bytes: int
    bytes_per_second: int
    hop_ns: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """Time of one decoded token through all stages and hops, and of the slowest stage with its hop."""

    token_ns: int
    slowest_ns: int


class Load:
    """What the layer ranges of one model weigh.

    In memory the embedding counts on the first stage, the head on the last, KV room on each layer. In time
    the embedding does not count (a token reads one row of it), the head does.
    """

    def __init__(self, model: DeployedModel) -> None:
        self.model = model.model
        self.num_layers = model.num_layers
        self.embedding_bytes = model.embedding_bytes
        self.head_bytes = model.head_bytes
        self._read = list(accumulate(model.layer_bytes, initial=0))
        self._held = [read + i * model.kv_room_bytes_per_layer for i, read in enumerate(self._read)]

    def memory_bytes(self, start: int, end: int) -> int:
        embedding = self.embedding_bytes if start == 0 else 0
        head = self.head_bytes if end == self.num_layers else 0
        return self._held[end] - self._held[start] + embedding + head

    def read_bytes(self, start: int, end: int) -> int:
        """Bytes of weights that one decoded token reads."""
        head = self.head_bytes if end == self.num_layers else 0
        return self._read[end] - self._read[start] + head

    def furthest(self, start: int, memory_bytes: int, read_bytes: int) -> int:
        """The last `end` such that `[start, end)` stays within both limits; `start` if no layer does."""
        embedding = self.embedding_bytes if start == 0 else 0
        end = min(
            bisect_right(self._held, self._held[start] + memory_bytes - embedding) - 1,
            bisect_right(self._read, self._read[start] + read_bytes) - 1,
        )
        if end == self.num_layers and not self._fits(start, end, memory_bytes, read_bytes):
            end -= 1
        return max(start, end)

    def _fits(self, start: int, end: int, memory_bytes: int, read_bytes: int) -> bool:
        return self.memory_bytes(start, end) <= memory_bytes and self.read_bytes(start, end) <= read_bytes


def stage_ns(load: Load, seat: Seat, start: int, end: int, num_stages: int) -> int:
    hop_ns = seat.hop_ns if num_stages > 1 else 0
    return load.read_bytes(start, end) * NS_PER_SECOND // seat.bytes_per_second + hop_ns


def predict(load: Load, seats: Mapping[bytes, Seat], assignments: Sequence[Assignment]) -> Prediction:
    times_ns = [
        stage_ns(load, seats[a.node], a.start_layer, a.end_layer, len(assignments)) for a in assignments
    ]
    return Prediction(sum(times_ns), max(times_ns))


def fill(load: Load, seats: Sequence[Seat], limit_ns: int) -> tuple[int, ...] | None:
    """Ends of the ranges if each seat in turn takes all it can within `limit_ns`; None if layers remain.

    Every seat takes at least one layer.
    """
    ends: list[int] = []
    start = 0
    for num_before, seat in enumerate(seats):
        furthest = load.furthest(start, seat.free_bytes, readable_bytes(seat, limit_ns, len(seats)))
        end = min(furthest, load.num_layers - (len(seats) - num_before - 1))
        if end <= start:
            return None
        ends.append(end)
        start = end
    return tuple(ends) if start == load.num_layers else None


def readable_bytes(seat: Seat, limit_ns: int, num_stages: int) -> int:
    hop_ns = seat.hop_ns if num_stages > 1 else 0
    return max(0, limit_ns - hop_ns) * seat.bytes_per_second // NS_PER_SECOND


def patience_ns(load: Load, seats: Sequence[Seat]) -> int:
    """A limit that no stage reaches: only memory decides."""
    return 1 + max(stage_ns(load, seat, 0, load.num_layers, 2) for seat in seats)


def balance(load: Load, seats: Sequence[Seat]) -> tuple[Assignment, ...] | None:
    """Cut so that the slowest stage is as fast as this order of seats allows; None if it does not fit."""
    low_ns, high_ns = 0, patience_ns(load, seats)
    ends = fill(load, seats, high_ns)
    if ends is None:
        return None
    while high_ns - low_ns > 1 + high_ns // PRECISION:
        middle_ns = (low_ns + high_ns) // 2
        tried = fill(load, seats, middle_ns)
        if tried is None:
            low_ns = middle_ns
        else:
            high_ns, ends = middle_ns, tried
    starts = (0, *ends[:-1])
    return tuple(
        Assignment(load.model, start, end, seat.node)
        for start, end, seat in zip(starts, ends, seats, strict=True)
    )
