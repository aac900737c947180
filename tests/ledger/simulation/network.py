"""Messages of a simulated pod: lost, late, doubled, out of order, and cut off by partitions."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

MAX_DELAY_MS = 3_000


@dataclass(frozen=True, slots=True)
class Message:
    """`kind` is heads, batch, receipt or co-signed; sender and receiver are nodes' numbers."""

    kind: str
    sender: int
    receiver: int
    payload: bytes = field(repr=False)


class Network:
    def __init__(self, choice: random.Random, num_nodes: int) -> None:
        self._choice = choice
        self._sides = [0] * num_nodes
        self._queue: list[tuple[int, int, Message]] = []
        self._num_sent = 0
        self.loss = choice.choice([0.0, 0.05, 0.3])
        self.doubled = choice.choice([0.0, 0.1, 0.3])

    def send(self, message: Message, now_ms: int) -> None:
        if message.sender == message.receiver or self._choice.random() < self.loss:
            return
        for _ in range(2 if self._choice.random() < self.doubled else 1):
            due_ms = now_ms + self._choice.randrange(1, MAX_DELAY_MS)
            self._num_sent += 1
            heapq.heappush(self._queue, (due_ms, self._num_sent, message))

    def due(self, now_ms: int) -> list[Message]:
        """What arrives by now; a partition swallows what is on its way too."""
        found = []
        while self._queue and self._queue[0][0] <= now_ms:
            message = heapq.heappop(self._queue)[2]
            if self._sides[message.sender] == self._sides[message.receiver]:
                found.append(message)
        return found

    def split(self) -> None:
        """A new partition into one to three sides, whoever stood where before."""
        num_sides = self._choice.choice([1, 2, 2, 3])
        self._sides = [self._choice.randrange(num_sides) for _ in self._sides]

    def heal(self) -> None:
        self._sides = [0] * len(self._sides)
        self.loss = self.doubled = 0.0
