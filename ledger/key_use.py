"""What each API key was used for: what it paid, and when its sessions opened and were settled.

A part of the books, told of every payment and session. It knows no limits: those are the gateway's to keep.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass

# The latest of each key; enough for the sliding minute of the busiest.
MAX_NUM_RECENT = 8192

Key = tuple[bytes, bytes]
"""(member, key id)"""

Place = tuple[int, bytes, bytes, int]
"""(time_ms, head, session, tokens)"""


@dataclass(frozen=True, slots=True)
class KeyUse:
    """One key as the books know it now; `opened_ms` and `settled` (time, tokens) are of a recent stretch."""

    spent_microcredits: int
    held_microcredits: int
    opened_ms: tuple[int, ...] = ()
    settled: tuple[tuple[int, int], ...] = ()


class KeyUses:
    """Mutable, owned by `Books`. Told the same in any order, it ends the same."""

    def __init__(self) -> None:
        self._spent: defaultdict[Key, int] = defaultdict(int)
        self._opened: defaultdict[Key, list[Place]] = defaultdict(list)
        self._settled: defaultdict[Key, list[Place]] = defaultdict(list)

    def pay(self, key: Key, amount_microcredits: int) -> None:
        self._spent[key] += amount_microcredits

    def spent_microcredits(self, key: Key) -> int:
        return self._spent.get(key, 0)

    def open(self, key: Key, head: bytes, session: bytes, before_ms: int | None, time_ms: int) -> None:
        """`before_ms` is what was said of this session before, by an author that signed two histories."""
        _move(self._opened[key], before_ms, (time_ms, head, session, 0))

    def settle(
        self, key: Key, head: bytes, session: bytes, before_ms: int | None, time_ms: int, num_tokens: int
    ) -> None:
        _move(self._settled[key], before_ms, (time_ms, head, session, num_tokens))

    def opened_since(self, key: Key, since_ms: int) -> list[Place]:
        places = self._opened.get(key, [])
        return places[bisect_left(places, (since_ms,)) :]

    def settled_since(self, key: Key, since_ms: int) -> list[Place]:
        places = self._settled.get(key, [])
        return places[bisect_left(places, (since_ms,)) :]


def _move(places: list[Place], before_ms: int | None, place: Place) -> None:
    if before_ms is not None:
        head_and_session = place[1:3]
        at = bisect_left(places, (before_ms, *head_and_session))
        if at < len(places) and places[at][:3] == (before_ms, *head_and_session):
            del places[at]
    insort(places, place)
    if len(places) > MAX_NUM_RECENT:
        del places[0]
