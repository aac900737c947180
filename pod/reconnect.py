"""Keeps this node connected to every other node of the roster: dials those that are not, at the addresses
known so far, with bounded backoff. Knows addresses only through the function it is given.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from functools import partial

from pod.control import ControlError, ControlTransport

TICK_S = 0.25
DIAL_TIMEOUT_S = 8.0
FIRST_DELAY_S = 0.5
# A node that was seen lately is probably restarting: it is tried every few seconds.
MAX_DELAY_S = 4.0
MAX_DELAY_OF_LOST_S = 30.0
LOST_AFTER_NUM_FAILURES = 60
MAX_NUM_DIALS_AT_ONCE = 8

log = logging.getLogger("pod.reconnect")


class Reconnector:
    """`wanted` are the nodes to be connected to, `addresses` where one may be, best first."""

    def __init__(
        self,
        transport: ControlTransport,
        wanted: Callable[[], frozenset[bytes]],
        addresses: Callable[[bytes], Sequence[str]],
        clock_s: Callable[[], float],
    ) -> None:
        self._transport = transport
        self._wanted = wanted
        self._addresses = addresses
        self._clock_s = clock_s
        self._next_try_s: dict[bytes, float] = {}
        self._num_failures: dict[bytes, int] = {}
        self._dials: dict[bytes, asyncio.Task[None]] = {}
        transport.on_peer(self._on_peer)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                self._dial_due(self._clock_s())
                await asyncio.sleep(TICK_S)
        finally:
            for dial in self._dials.values():
                dial.cancel()

    def soon(self, node: bytes) -> None:
        """There is a new reason to hope: an address was learnt."""
        self._num_failures.pop(node, None)
        self._next_try_s.pop(node, None)

    def _dial_due(self, now_s: float) -> None:
        missing = self._wanted() - self._transport.peers() - self._dials.keys()
        for node in missing:
            # Of two nodes that miss each other one goes first, so that they rarely dial each other at once.
            first_s = now_s if self._transport.node_id < node else now_s + FIRST_DELAY_S
            due_s = self._next_try_s.setdefault(node, first_s)
            if due_s <= now_s and len(self._dials) < MAX_NUM_DIALS_AT_ONCE and self._addresses(node):
                task = asyncio.get_running_loop().create_task(self._dial(node))
                self._dials[node] = task
                task.add_done_callback(partial(self._dialled, node))

    async def _dial(self, node: bytes) -> None:
        try:
            await self._transport.connect(node, self._addresses(node), DIAL_TIMEOUT_S)
        except ControlError as error:
            num_failures = self._num_failures.get(node, 0) + 1
            self._num_failures[node] = num_failures
            self._next_try_s[node] = self._clock_s() + _delay_s(num_failures)
            log.debug("%s", error)

    def _dialled(self, node: bytes, _: asyncio.Task[None]) -> None:
        self._dials.pop(node, None)

    def _on_peer(self, node: bytes, up: bool) -> None:
        self._num_failures.pop(node, None)
        self._next_try_s.pop(node, None)


def _delay_s(num_failures: int) -> float:
    longest_s = MAX_DELAY_S if num_failures < LOST_AFTER_NUM_FAILURES else MAX_DELAY_OF_LOST_S
    delay_s = min(longest_s, FIRST_DELAY_S * 2.0 ** min(num_failures - 1, 10))
    return delay_s * random.uniform(0.7, 1.0)  # noqa: S311  # jitter, no secret
