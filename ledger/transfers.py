"""How much of each transfer moves: a member gives away no more than it was granted, earned by serving or got
from the treasury, and its credit line.

A bound and not a refusal: whether an account was overdrawn when a transfer was written depends on what had
arrived where, and entries must count the same everywhere. So a node refuses to *write* a transfer beyond
balance and credit line, and of what a changed node writes all the same, together more than the bound, each
target gets its share, in whatever order they come. What was received from members can be spent, not given
on: else a few accounts could pass one amount around in a circle and it would cover them all. The treasury's
own transfers are the owner's and move in full. Knows no signatures and no balances.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

Changes = Mapping[bytes, int]
"""Change of each account in microcredits; they sum to 0."""


class Transfers:
    """Mutable, owned by `Books`."""

    def __init__(self) -> None:
        self._cover: defaultdict[bytes, int] = defaultdict(int)
        self._written: defaultdict[bytes, int] = defaultdict(int)
        # By source, what was written to each target in all: as many as there are members, however often.
        self._sent: defaultdict[bytes, defaultdict[bytes, int]] = defaultdict(lambda: defaultdict(int))

    def add(self, source: bytes, target: bytes, amount_microcredits: int) -> Changes:
        """A member's transfer was written."""
        if self._written[source] + amount_microcredits <= self._cover[source]:
            self._write(source, target, amount_microcredits)
            return {source: -amount_microcredits, target: amount_microcredits}
        before = self._moved(source)
        self._write(source, target, amount_microcredits)
        return _difference(before, self._moved(source))

    def cover(self, account: bytes, amount_microcredits: int) -> Changes:
        """The account was given something that it may give away; negative when that was taken back."""
        covered = self._cover[account]
        if self._written[account] <= min(covered, covered + amount_microcredits):
            self._cover[account] += amount_microcredits
            return {}
        before = self._moved(account)
        self._cover[account] += amount_microcredits
        return _difference(before, self._moved(account))

    def left_microcredits(self, account: bytes) -> int:
        """How much more of the account's credit transfers can move."""
        return max(0, self._cover.get(account, 0) - self._written.get(account, 0))

    def _write(self, source: bytes, target: bytes, amount_microcredits: int) -> None:
        self._sent[source][target] += amount_microcredits
        self._written[source] += amount_microcredits

    def _moved(self, source: bytes) -> dict[bytes, int]:
        """What the account's transfers move in all: the source's change and each target's."""
        covered, written = max(0, self._cover[source]), self._written[source]
        changes: defaultdict[bytes, int] = defaultdict(int)
        for target, amount in self._sent[source].items():
            moved = amount if written <= covered else amount * covered // written
            changes[target] += moved
            changes[source] -= moved
        return changes


def _difference(before: Changes, after: Changes) -> Changes:
    changes = {account: after.get(account, 0) - before.get(account, 0) for account in {**before, **after}}
    return {account: change for account, change in changes.items() if change}
