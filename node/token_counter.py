"""A weighted Virtual Token Counter per member (Sheng et al., "Fairness in Serving Large Language Models",
OSDI 2024): who has the lowest goes first, and a token moves a counter the less, the more its member weighs.

Pure: it knows no clock, no sessions and no balances. Whoever keeps a queue says who waits there, and charges
what was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

PER_MILLE = 1_000
MAX_NUM_MEMBERS = 4096
_SCALE = 1_000


class TokenCounter:
    """`weight_of(member)` is from 1 to 1000 per mille, and may change at any time: only later tokens count
    by the new one.
    """

    def __init__(self, weight_of: Callable[[bytes], int], max_num_members: int = MAX_NUM_MEMBERS) -> None:
        self._weight_of = weight_of
        self._max_num_members = max_num_members
        self._counts: dict[bytes, int] = {}
        self._last_served = b""

    def count(self, member: bytes) -> int:
        """In thousandths of the unit of costs, at full weight."""
        return self._counts.get(member, 0)

    def charge(self, member: bytes, cost: int) -> None:
        """`cost` was computed for the member, in units of whoever keeps the counter."""
        weight = max(1, min(PER_MILLE, self._weight_of(member)))
        self._counts[member] = self.count(member) + cost * _SCALE * PER_MILLE // weight
        self._last_served = member
        if len(self._counts) > self._max_num_members:
            self._forget_lowest()

    def lift(self, member: bytes, others: Iterable[bytes], max_lag: int = 0) -> None:
        """`member` asks while `others` are served or wait: it is at most `max_lag` behind the lowest of them.

        With a lag of 0 that is for a member that was idle, so that nobody saves up turns while away. With no
        others, whoever was served last stands for them.
        """
        counts = [self.count(other) for other in others if other != member]
        level = min(counts) if counts else self.count(self._last_served)
        level -= max_lag * _SCALE
        if level > self.count(member):
            self._counts[member] = level

    def _forget_lowest(self) -> None:
        """Half of them: they come back as members that were idle do."""
        by_count = sorted(self._counts, key=self._counts.__getitem__)
        for member in by_count[: len(by_count) // 2]:
            del self._counts[member]
