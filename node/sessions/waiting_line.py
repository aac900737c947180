"""The line at a gateway: which of its waiting requests ask the stages for room, and who comes next.

A few requests of a member and model ask at a time, the others stand behind them; of the members, those with
the lowest virtual token counters ask. Who gets the room is for the stages to say, which know all gateways:
here the asking is only kept short, and each member's requests in order. Owned by the event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from node.token_counter import TokenCounter

MAX_NUM_WAITING = 2048
MAX_NUM_WAITING_OF_MEMBER = 256
MAX_NUM_ASKING = 40
# As many as may come in at once when several sessions end in one step.
MAX_NUM_ASKING_OF_LINE = 4

_Line = tuple[bytes, bytes]


class LineFull(Exception):
    """Too many wait already; the message is one line."""


class WaitingLine:
    def __init__(self, counter: TokenCounter, own_member: Callable[[], bytes | None]) -> None:
        """`own_member()` owns this machine: it comes first here."""
        self._counter = counter
        self._own_member = own_member
        # Those that ask are at the front of their line.
        self._lines: OrderedDict[_Line, deque[asyncio.Future[None]]] = OrderedDict()
        self._asking: Counter[_Line] = Counter()
        self._num_of_member: Counter[bytes] = Counter()

    @property
    def num_waiting(self) -> int:
        """Those that ask included."""
        return self._num_of_member.total()

    def is_behind(self, member: bytes, model: bytes) -> bool:
        """Whether a new request has others of its member and model before it."""
        return (member, model) in self._lines

    @asynccontextmanager
    async def turn(self, member: bytes, model: bytes) -> AsyncIterator[None]:
        """Wait until this request may ask; it asks until it leaves. Raises LineFull."""
        self._check_room(member)
        line, entry = (member, model), asyncio.get_running_loop().create_future()
        if not self._num_of_member[member]:
            self._counter.lift(member, [other for other, num in self._num_of_member.items() if num])
        self._num_of_member[member] += 1
        self._lines.setdefault(line, deque()).append(entry)
        try:
            self._choose()
            await entry
            yield
        finally:
            self._leave(line, entry)

    def _check_room(self, member: bytes) -> None:
        if self.num_waiting >= MAX_NUM_WAITING:
            raise LineFull(f"{self.num_waiting} requests wait at this node already")
        if (num_waiting := self._num_of_member[member]) >= MAX_NUM_WAITING_OF_MEMBER:
            raise LineFull(f"{num_waiting} requests of this member wait at this node already")

    def _leave(self, line: _Line, entry: asyncio.Future[None]) -> None:
        waiting = self._lines[line]
        if waiting.index(entry) < self._asking[line]:
            self._asking[line] -= 1
        waiting.remove(entry)
        if not waiting:
            del self._lines[line], self._asking[line]
        self._num_of_member[line[0]] -= 1
        if not self._num_of_member[line[0]]:
            del self._num_of_member[line[0]]
        self._choose()

    def _choose(self) -> None:
        """Let the next ask: one of each line, then a second of each, and so on."""
        num_left = MAX_NUM_ASKING - self._asking.total()
        for num_asking in range(MAX_NUM_ASKING_OF_LINE):
            able = [line for line in self._lines if self._can_ask(line, num_asking)] if num_left > 0 else []
            for line in sorted(able, key=self._rank)[:num_left]:
                entry = self._lines[line][num_asking]
                self._asking[line] += 1
                num_left -= 1
                if not entry.done():
                    entry.set_result(None)

    def _can_ask(self, line: _Line, num_asking: int) -> bool:
        return self._asking[line] == num_asking < len(self._lines[line])

    def _rank(self, line: _Line) -> tuple[bool, int]:
        return line[0] != self._own_member(), self._counter.count(line[0])
