"""Openings that wait for room at a stage: their heads are told nothing until there is some, or time is up.

So room goes to whose turn it is the moment it comes free, not when somebody happens to ask. Owned by the loop
thread; whether one may come in is `admission.py`'s business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from node.engine.admission import Candidate
from node.engine.opening import NoRoom, Refusal
from node.engine.turns import Asker, Rank

# At a later stage it keeps a place at the first one from others meanwhile.
MAX_WAIT_MS = 1_000
MAX_WAIT_AT_LATER_STAGE_MS = 200
MAX_NUM_WAITING = 256
MAX_NUM_WAITING_PER_HEAD = 48
# Besides when room may have come free: others' time to take theirs may be up.
CHECK_EVERY_MS = 20

LetIn = Callable[[Candidate], None]
"""Open the session, room and all. Raises Refusal."""

RankOf = Callable[[Candidate], Rank]


@dataclass(slots=True, eq=False)
class _Waiting:
    candidate: Candidate
    until_ms: int


class WaitingRoom:
    def __init__(self) -> None:
        self._waiting: dict[bytes, _Waiting] = {}
        self._num_of_head: Counter[bytes] = Counter()
        self._last_check = (0, 0)

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, session: bytes) -> bool:
        return session in self._waiting

    def add(self, candidate: Candidate, now_ms: int) -> bool:
        """False when too many wait."""
        opening = candidate.opening
        is_full = len(self._waiting) >= MAX_NUM_WAITING
        if is_full or self._num_of_head[opening.head] >= MAX_NUM_WAITING_PER_HEAD:
            return False
        wait_ms = MAX_WAIT_AT_LATER_STAGE_MS if opening.stage_index else MAX_WAIT_MS
        self._waiting[opening.session] = _Waiting(candidate, now_ms + wait_ms)
        self._num_of_head[opening.head] += 1
        return True

    def remove(self, head: bytes, session: bytes | None = None) -> None:
        """What this head has waiting: one session, or all."""
        for waiting in list(self._waiting.values()):
            opening = waiting.candidate.opening
            if opening.head == head and session in (None, opening.session):
                self._drop(waiting)

    def admit(
        self, let_in: LetIn, rank_of: RankOf, now_ms: int, num_quieted: int
    ) -> list[tuple[Candidate, Refusal]]:
        """In order of rank; returns who waited in vain. `num_quieted` rises when room may have come free."""
        last_ms, last_num_quieted = self._last_check
        is_soon = now_ms - last_ms < CHECK_EVERY_MS and num_quieted == last_num_quieted
        if not self._waiting or is_soon:
            return []
        self._last_check = now_ms, num_quieted
        refused: list[tuple[Candidate, Refusal]] = []
        no_room: dict[Asker, tuple[int, NoRoom]] = {}
        for waiting in sorted(self._waiting.values(), key=lambda waiting: rank_of(waiting.candidate)):
            candidate = waiting.candidate
            known = no_room.get(candidate.asker)
            refusal: Refusal | None
            if known is not None and candidate.num_wanted_tokens >= known[0]:
                refusal = known[1]
            else:
                refusal = self._try(let_in, candidate)
            if isinstance(refusal, NoRoom):
                no_room[candidate.asker] = candidate.num_wanted_tokens, refusal
                if now_ms < waiting.until_ms:
                    continue
            if refusal is not None:
                refused.append((candidate, refusal))
            self._drop(waiting)
        return refused

    def _try(self, let_in: LetIn, candidate: Candidate) -> Refusal | None:
        try:
            let_in(candidate)
        except Refusal as refusal:
            return refusal
        return None

    def _drop(self, waiting: _Waiting) -> None:
        opening = waiting.candidate.opening
        del self._waiting[opening.session]
        self._num_of_head[opening.head] -= 1
        if not self._num_of_head[opening.head]:
            del self._num_of_head[opening.head]
