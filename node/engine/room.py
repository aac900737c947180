"""Room for what a step writes: tables grow, and when blocks run out, sessions are preempted.

Cached blocks that no session uses have gone by then: the pool gives them away by itself. Of the sessions it
takes one that is finished or waits for its head, else the youngest that was not preempted here before. So
the oldest always goes on, and the others after it. What else is said to be a replay is believed only among
the sessions of its own payer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from node.engine.session import Slice, StageSession
from node.engine.turns import Claim


def make_room(batch: Iterable[Slice], sessions: Collection[StageSession]) -> list[StageSession]:
    """Grow the tables of all in `batch`. Returns who had to give up their KV for it, in this batch or not."""
    preempted: list[StageSession] = []
    for part in batch:
        session = part.session
        if part.end <= session.table.num_tokens:
            continue
        cache = session.loaded.cache
        while not session.is_set_aside and not cache.grow(session.table, part.end):
            victim = _victim([s for s in sessions if s.loaded is session.loaded and s.table.blocks])
            victim.set_aside()
            preempted.append(victim)
    return preempted


def _victim(sessions: list[StageSession]) -> StageSession:
    payer = max(sessions, key=_rank).payer
    return max((session for session in sessions if session.payer == payer), key=_rank_among_own)


def _rank(session: StageSession) -> tuple[bool, bool, int]:
    """The highest is preempted first."""
    was_preempted = session.claim is Claim.PREEMPTED
    return session.is_finished or session.is_paused, not was_preempted, session.number


def _rank_among_own(session: StageSession) -> tuple[bool, bool, int]:
    is_replay = session.opening.num_output_tokens_before > 0
    return session.is_finished or session.is_paused, not is_replay, session.number
