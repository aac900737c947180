"""The sessions of one engine: by id, whose input waits, by group, head and payer, and when each is overdue.

It only keeps them; what happens to a session is decided elsewhere. Owned by the loop thread.
"""

from __future__ import annotations

import heapq
from collections import Counter

from node.engine.group import Group
from node.engine.loaded import LoadedShard
from node.engine.session import StageSession

MAX_NUM_GROUPS = 64
_GroupKey = tuple[int, int, int, int]


class SessionBook:
    def __init__(self) -> None:
        self.sessions: dict[bytes, StageSession] = {}
        # In the order they became ready: who has just run goes to the back.
        self.ready: dict[StageSession, None] = {}
        self.groups: dict[_GroupKey, Group] = {}
        self.num_of_head: Counter[bytes] = Counter()
        self.num_of_payer: Counter[bytes] = Counter()
        # Rises whenever room may have come free.
        self.num_quieted = 0
        self._deadlines: list[tuple[int, bytes]] = []
        self._num_so_far = 0

    @property
    def num_with_kv(self) -> int:
        """Those set aside take no place."""
        return sum(not session.is_set_aside for session in self.sessions.values())

    def next_number(self) -> int:
        self._num_so_far += 1
        return self._num_so_far

    def group(self, loaded: LoadedShard, start_layer: int, end_layer: int, num_stages: int) -> Group:
        key = (id(loaded), start_layer, end_layer, num_stages)
        group = self.groups.get(key)
        if group is None or group.loaded is not loaded:
            if len(self.groups) >= MAX_NUM_GROUPS:
                self.groups = {key: group for key, group in self.groups.items() if group.num_sessions}
            group = self.groups[key] = Group(loaded, start_layer, end_layer, num_stages)
        return group

    def drop_groups(self, loaded: LoadedShard) -> None:
        self.groups = {key: group for key, group in self.groups.items() if group.loaded is not loaded}

    def add(self, session: StageSession) -> None:
        self.sessions[session.id] = session
        self.num_of_head[session.head] += 1
        self.num_of_payer[session.payer] += 1
        session.group.num_sessions += 1

    def remove(self, session: StageSession) -> bool:
        """False when it was removed before."""
        if self.sessions.pop(session.id, None) is None:
            return False
        self.num_of_head[session.head] -= 1
        if not self.num_of_head[session.head]:
            del self.num_of_head[session.head]
        self.num_of_payer[session.payer] -= 1
        if not self.num_of_payer[session.payer]:
            del self.num_of_payer[session.payer]
        session.group.num_sessions -= 1
        self.quiet(session)
        return True

    def quiet(self, session: StageSession) -> None:
        """Nothing of it runs any more."""
        self.num_quieted += 1
        self.ready.pop(session, None)
        session.waiting.clear()
        self._stop_decoding(session)

    def pause(self, session: StageSession) -> None:
        """What waits goes on waiting until `resume`."""
        session.is_paused = True
        self.ready.pop(session, None)
        self._stop_decoding(session)

    def resume(self, session: StageSession) -> None:
        session.is_paused = False
        if session.waiting:
            self.make_ready(session)

    def make_ready(self, session: StageSession) -> None:
        """Input of it waits."""
        if session.is_paused:
            return
        self.ready[session] = None
        if not session.is_decoding and session.next_position > session.num_prompt_tokens:
            session.is_decoding = True
            session.group.num_decoding += 1

    def _stop_decoding(self, session: StageSession) -> None:
        if session.is_decoding:
            session.is_decoding = False
            session.group.num_decoding -= 1

    def set_deadline(self, session: StageSession, deadline_ms: int) -> None:
        """What the heap holds of older deadlines and of ended sessions is swept out as it grows."""
        session.deadline_ms = deadline_ms
        if len(self._deadlines) > 4 * len(self.sessions) + 64:
            self._deadlines = [(other.deadline_ms, other.id) for other in self.sessions.values()]
            heapq.heapify(self._deadlines)
        else:
            heapq.heappush(self._deadlines, (deadline_ms, session.id))

    @property
    def next_deadline_ms(self) -> int | None:
        """Not later than the first that counts."""
        return self._deadlines[0][0] if self._deadlines else None

    def overdue(self, now_ms: int) -> list[StageSession]:
        found = []
        while self._deadlines and self._deadlines[0][0] <= now_ms:
            session = self.sessions.get(heapq.heappop(self._deadlines)[1])
            if session is not None and session.deadline_ms <= now_ms:
                found.append(session)
        return found
