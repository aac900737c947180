"""Dividends: what the treasury pays, out of the levy of a period, in equal parts to the members active in it.

Pure over the set of entries, with no clock, so that every node computes the same in any order of arrival:

- A payment belongs to the period in which the hold it is paid from was opened, by the date on that entry.
  How long periods are, and which part of the levy is paid out, says the rate card that the receipt names.
- Active are the payers and the members of the stages of all payments of that period that count.
- A period pays once more than half of the members whose nodes opened its sessions have dated an entry after
  its end. A clock that runs ahead, by mistake or not, is one voice among those: it closes no period but one
  in which its member alone opened sessions. Who never writes again is one voice less, and then dividends
  that no majority asks for stay in the treasury.
- What arrives late is counted in: the period's dividends are divided anew.

So a period never pays more than its own share of its levy, whatever anybody dates: closing a period early,
or being in one by a wrong date, changes who shares it and when. A member that dates its sessions into a
period of its own gets back no more than the dividend part of its own sessions' levy. Knows no accounts and
no rate card.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

PeriodKey = tuple[int, int]
"""(end_ms, length in seconds): also the order in which periods end."""

# Change of each member's account in microcredits; the treasury's is the opposite of their sum.
Changes = Mapping[bytes, int]
_NO_CHANGES: Changes = {}


@dataclass(frozen=True, slots=True)
class PaidWork:
    """A payment as dividends see it. `opened_ms` and `head` (the member whose node it is) are its hold's."""

    opened_ms: int
    period_s: int
    head: bytes
    payer: bytes
    server: bytes
    dividend_microcredits: int


@dataclass(frozen=True, slots=True)
class Period:
    """`[start_ms, end_ms)` for people. Not paid yet: `per_member_microcredits` is what each would get."""

    start_ms: int
    end_ms: int
    dividend_microcredits: int
    num_members: int
    per_member_microcredits: int
    is_paid: bool


@dataclass(slots=True)
class _Pool:
    """One period. `active` and `heads` count the payments that each member has a part in."""

    end_ms: int
    period_s: int
    dividend_microcredits: int = 0
    active: dict[bytes, int] = field(default_factory=dict)
    heads: dict[bytes, int] = field(default_factory=dict)
    num_heads_past: int = 0
    paid: dict[bytes, int] = field(default_factory=dict)

    @property
    def is_closed(self) -> bool:
        return 2 * self.num_heads_past > len(self.heads)

    @property
    def share_microcredits(self) -> int:
        """Rounded down; the rest stays in the treasury."""
        return self.dividend_microcredits // len(self.active) if self.active else 0

    def pay(self) -> Changes:
        """What brings the members' accounts from what was paid to what is due."""
        if not self.is_closed and not self.paid:
            return _NO_CHANGES
        before = self.paid
        share = self.share_microcredits if self.is_closed else 0
        self.paid = dict.fromkeys(self.active, share) if share else {}
        changes = {member: -amount for member, amount in before.items()}
        for member, amount in self.paid.items():
            changes[member] = changes.get(member, 0) + amount
        return {member: change for member, change in changes.items() if change}


class Dividends:
    """Mutable, owned by `Books`, which puts the changes into its postings."""

    def __init__(self) -> None:
        self._pools: dict[PeriodKey, _Pool] = {}
        self._ends: list[PeriodKey] = []
        self._latest_ms: dict[bytes, int] = {}

    def count(self, work: PaidWork, sign: int) -> Changes:
        """A payment counts from now on (`sign` 1), or no longer does (-1)."""
        pool = self._pool(work.opened_ms, work.period_s)
        pool.dividend_microcredits += sign * work.dividend_microcredits
        _add(pool.active, work.payer, sign)
        _add(pool.active, work.server, sign)
        was_head = work.head in pool.heads
        _add(pool.heads, work.head, sign)
        is_head = work.head in pool.heads
        if was_head is not is_head and self._latest_ms.get(work.head, -1) >= pool.end_ms:
            pool.num_heads_past += 1 if is_head else -1
        return pool.pay()

    def date(self, member: bytes, time_ms: int) -> Changes:
        """A node of `member` has written an entry dated `time_ms`."""
        before_ms = self._latest_ms.get(member, -1)
        if time_ms <= before_ms:
            return _NO_CHANGES
        self._latest_ms[member] = time_ms
        first, last = (bisect_right(self._ends, (ms + 1,)) for ms in (before_ms, time_ms))
        changes: defaultdict[bytes, int] = defaultdict(int)
        for key in self._ends[first:last]:
            pool = self._pools[key]
            if member in pool.heads:
                pool.num_heads_past += 1
                for account, change in pool.pay().items():
                    changes[account] += change
        return changes

    def periods(self) -> list[Period]:
        """All that have something to divide, the one that ends last first."""
        pools = [self._pools[key] for key in reversed(self._ends)]
        return [
            Period(
                start_ms=pool.end_ms - 1000 * pool.period_s,
                end_ms=pool.end_ms,
                dividend_microcredits=pool.dividend_microcredits,
                num_members=len(pool.active),
                per_member_microcredits=pool.share_microcredits,
                is_paid=pool.is_closed,
            )
            for pool in pools
            if pool.dividend_microcredits
        ]

    def _pool(self, opened_ms: int, period_s: int) -> _Pool:
        period_ms = 1000 * period_s
        key = ((opened_ms // period_ms + 1) * period_ms, period_s)
        if key not in self._pools:
            self._pools[key] = _Pool(*key)
            insort(self._ends, key)
        return self._pools[key]


def _add(counts: dict[bytes, int], member: bytes, sign: int) -> None:
    counts[member] = counts.get(member, 0) + sign
    if not counts[member]:
        del counts[member]
