"""When to plan anew, and who does it: the live serving node with the smallest id, for as long as it is that.

The plan itself is `placement.plan`; how it spreads is the plan book's. A node that went away, or that is just
starting, is waited for a while: a restart takes seconds, and moving layers costs more than that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from node.placement.plan import Plan, plan
from node.plan_book import PlanBook
from node.pod_state import PodState

log = logging.getLogger(__name__)

PATIENCE_S = 20.0
SETTLE_S = 0.3
CHECK_EVERY_S = 2.0


class Planner:
    """`run` until cancelled; `wake` when something changed."""

    def __init__(
        self,
        node: bytes,
        state: PodState,
        book: PlanBook,
        sign: Callable[[bytes], bytes],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = node
        self._state = state
        self._book = book
        self._sign = sign
        self._clock_s = clock_s
        self._changed = asyncio.Event()
        self._awaited_since_s: dict[bytes, float] = {}
        self._waiting_since_s: float | None = None

    def wake(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                # Nothing but patience running out changes by itself.
                timeout_s = CHECK_EVERY_S if self._awaited_since_s else None
                await asyncio.wait_for(self._changed.wait(), timeout_s)
                # Changes come in bursts: one plan for all of them.
                await asyncio.sleep(SETTLE_S)
            self._changed.clear()
            try:
                await self.consider()
            except OSError as error:
                log.warning("a plan could not be stored: %s", error)

    async def consider(self) -> bool:
        """Plan if it is this node's turn and nobody is waited for. Returns whether there is a new plan."""
        if self._is_waiting() or not self._is_my_turn():
            return False
        current, view = self._book.plan, self._state.view()
        planned = await asyncio.to_thread(plan, view, current, self._node)
        if planned is None and current is not None and not self._book.may_plan(current.author):
            # Others refuse a plan whose author has left: the same plan again, in a name that counts.
            planned = Plan(current.epoch + 1, self._node, current.assignments)
        if planned is None or not self._book.publish(planned, self._sign):
            return False
        log.info("plan %d: %d assignments", planned.epoch, len(planned.assignments))
        return True

    def _is_my_turn(self) -> bool:
        live, statuses = self._state.live(), self._state.statuses()
        able = [n for n, s in statuses.items() if s.serving and n in live and self._book.may_plan(n)]
        return bool(able) and min(able) == self._node

    def _is_waiting(self) -> bool:
        """Whether some node may be back, or ready, any moment.

        Each is waited for `PATIENCE_S` at most, and all of them together twice that: a node that restarts
        again and again must not keep the others from planning.
        """
        now_s = self._clock_s()
        awaited = self._awaited()
        self._awaited_since_s = {node: self._awaited_since_s.get(node, now_s) for node in awaited}
        is_waiting = any(now_s - since_s < PATIENCE_S for since_s in self._awaited_since_s.values())
        if not is_waiting:
            self._waiting_since_s = None
            return False
        self._waiting_since_s = now_s if self._waiting_since_s is None else self._waiting_since_s
        return now_s - self._waiting_since_s < 2 * PATIENCE_S

    def _awaited(self) -> set[bytes]:
        """Live nodes that are starting or have not yet said whether they have a model's files, and nodes of
        the plan that are away or not able to serve yet.
        """
        live, statuses = self._state.live(), self._state.statuses()
        models = {model.model for model in self._state.view().models}
        starting = {
            node
            for node, status in statuses.items()
            if node in live and (status.starting or (status.serving and not models <= status.models_judged()))
        }
        assignments = self._book.plan.assignments if self._book.plan is not None else ()
        planned = {a.node for a in assignments} & self._state.roster.nodes.keys()
        away = {
            node for node in planned if node not in live or node not in statuses or not statuses[node].serving
        }
        return starting | away
