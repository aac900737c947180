"""Where the last few tokens of a text stood before in it, and what came after them there.

A table of fixed size for each length of the run that is looked for: a token is added and a run looked up in
constant time, and newer runs push older ones out. Knows token ids only.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

MAX_RUN, MIN_RUN = 4, 2
MAX_NUM_SLOTS = 1 << 16
_MIN_NUM_SLOTS = 1 << 8
_BASE = 0x9E3779B97F4A7C15
_MIX = 0xD6E8FEB86659FD93
_BITS_64 = (1 << 64) - 1


class NgramIndex:
    def __init__(self, token_ids: Sequence[int], max_num_tokens: int) -> None:
        """`max_num_tokens`: how long the text may become; more only makes old runs be forgotten sooner."""
        num_slots = _MIN_NUM_SLOTS
        while num_slots < min(max_num_tokens, MAX_NUM_SLOTS):
            num_slots *= 2
        self._shift = 65 - num_slots.bit_length()
        self._ids = array("I", token_ids)
        # By run length: where the token after the newest such run stands; 0 is none.
        self._places = {run: array("I", bytes(4 * num_slots)) for run in range(MIN_RUN, MAX_RUN + 1)}
        for run, places in self._places.items():
            self._add_all(run, places)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def num_bytes(self) -> int:
        return sum(4 * len(ids) for ids in (self._ids, *self._places.values()))

    def _add_all(self, run: int, places: array[int]) -> None:
        ids = np.frombuffer(self._ids, np.uint32).astype(np.uint64)
        num_runs = len(ids) - run
        if num_runs <= 0:
            return
        keys = ids[:num_runs].copy()
        for number in range(1, run):
            keys = keys * np.uint64(_BASE) + ids[number : number + num_runs]
        slots = (keys * np.uint64(_MIX)) >> np.uint64(self._shift)
        # Of equal slots the last is kept, which is the newest run.
        np.frombuffer(places, np.uint32)[slots] = np.arange(run, run + num_runs, dtype=np.uint32)

    def add(self, token_id: int) -> None:
        """The next token of the text: the runs before it now have something after them."""
        ids = self._ids
        place = len(ids)
        for run, slot in self._tail_slots():
            self._places[run][slot] = place
        ids.append(token_id)

    def following(self, max_num: int) -> tuple[int, tuple[int, ...]]:
        """The longest run at the end that stood before, and `max_num` tokens as they came after it there.

        Where those reach the end of the text they go on from themselves. (0, ()) if there is no such run.
        """
        ids, end = self._ids, len(self._ids)
        for run, slot in reversed(self._tail_slots()):
            place = self._places[run][slot]
            if place >= run and ids[place - run : place] == ids[end - run :]:
                found = ids[place : place + max_num]
                while len(found) < max_num:
                    found.extend(found[place - end :][: max_num - len(found)])
                return run, tuple(found)
        return 0, ()

    def _tail_slots(self) -> list[tuple[int, int]]:
        """The slot of each run that ends the text, the shortest first."""
        tail = self._ids[-MAX_RUN:]
        slots = []
        key, power = 0, 1
        for run in range(1, len(tail) + 1):
            key += power * tail[-run]
            power = power * _BASE & _BITS_64
            if run >= MIN_RUN:
                slots.append((run, (key * _MIX & _BITS_64) >> self._shift))
        return slots
