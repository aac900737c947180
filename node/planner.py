"""When to plan anew, and who does it: the live serving node with the smallest id, for as long as it is that.

The plan itself is `placement.plan`; how it spreads is the plan book's. A node that went away counts as there
for a while, so that a restart moves nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from node.placement.plan import plan
from node.plan_book import PlanBook
from node.pod_state import PodState

log = logging.getLogger(__name__)

# A restart takes seconds; moving layers costs more than waiting for it.
GRACE_S = 15.0
SETTLE_S = 0.3
CHECK_EVERY_S = 2.0


class Planner:
    """`run` until cancelled; `wake` when something changed."""

    def __init__(self, node: bytes, state: PodState, book: PlanBook, sign: Callable[[bytes], bytes]) -> None:
        self._node = node
        self._state = state
        self._book = book
        self._sign = sign
        self._changed = asyncio.Event()
        self._last_live_s: dict[bytes, float] = {}
        self._began_s = time.monotonic()

    def wake(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        while True:
            try:
                await asyncio.wait_for(self._changed.wait(), CHECK_EVERY_S)
                # Changes come in bursts: one plan for all of them.
                await asyncio.sleep(SETTLE_S)
            except TimeoutError:
                pass
            self._changed.clear()
            self._consider(time.monotonic())

    def _consider(self, now_s: float) -> None:
        live = self._state.live()
        for node in live:
            self._last_live_s[node] = now_s
        serving = [node for node, status in self._state.statuses().items() if status.serving and node in live]
        if not serving or min(serving) != self._node or self._has_just_begun(now_s):
            return
        expected = frozenset(n for n, seen_s in self._last_live_s.items() if now_s - seen_s < GRACE_S)
        view = self._state.view(live | expected)
        planned = plan(view, self._book.plan, self._node)
        if planned is not None and self._book.publish(planned, self._sign):
            log.info("plan %d: %d assignments", planned.epoch, len(planned.assignments))

    def _has_just_begun(self, now_s: float) -> bool:
        """After a start, nodes of the known plan get time to be heard before anything is moved off them."""
        if now_s - self._began_s > GRACE_S or self._book.plan is None:
            return False
        planned = {assignment.node for assignment in self._book.plan.assignments}
        return not planned & self._state.roster.nodes.keys() <= self._state.live()
