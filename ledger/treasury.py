"""The treasury's part of the books: starter grants, levy, dividends, and what covers a member's transfers.

Told the same in any order, it ends the same; each method returns the changes of accounts (they sum to 0) that
bring the books to what is due now. It knows no entries and no sessions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ledger.dividends import Dividends, PaidWork, Period
from ledger.entry import ISSUANCE, TREASURY
from ledger.rate_card import RateCard
from ledger.transfers import Transfers

Changes = Mapping[bytes, int]


@dataclass(frozen=True, slots=True)
class TreasuryTotals:
    """Over all time. `dividends_due_microcredits` is set aside for periods that have not paid yet."""

    issued_microcredits: int
    granted_microcredits: int
    levied_microcredits: int
    dividends_paid_microcredits: int
    dividends_due_microcredits: int


class Treasury:
    """Mutable, owned by `Books`."""

    def __init__(self) -> None:
        self._transfers = Transfers()
        self._dividends = Dividends()
        # Grant and credit line that each open account began with.
        self._grants: dict[bytes, tuple[int, int]] = {}
        self._received: defaultdict[bytes, int] = defaultdict(int)
        self._issued_microcredits = 0
        self._levied_microcredits = 0

    def issue(self, amount_microcredits: int) -> Changes:
        self._issued_microcredits += amount_microcredits
        return {ISSUANCE: -amount_microcredits, TREASURY: amount_microcredits}

    def is_open(self, member: bytes) -> bool:
        return member in self._grants

    def open_account(self, member: bytes, cards: Sequence[RateCard]) -> Changes:
        """The smallest grant that any entry names: needs no order, and nobody gains by a second."""
        known = self._grants.get(member)
        named = [(card.starter_grant_microcredits, card.credit_line_microcredits) for card in cards]
        terms = min(named if known is None else (known, *named))
        if terms == known:
            return {}
        before = known or (0, 0)
        self._grants[member] = terms
        granted = {TREASURY: before[0] - terms[0], member: terms[0] - before[0]}
        return together(granted, self._transfers.cover(member, sum(terms) - sum(before)))

    def transfer(self, source: bytes, target: bytes, amount_microcredits: int) -> Changes:
        """What the treasury gives, its owner decides; what members give is covered by what they got."""
        if source != TREASURY:
            return self._transfers.add(source, target, amount_microcredits)
        moved = {source: -amount_microcredits, target: amount_microcredits}
        return together(moved, self._transfers.cover(target, amount_microcredits))

    def earn(self, member: bytes, amount_microcredits: int) -> Changes:
        """The member's stage was paid; covers its transfers. Negative when a payment is taken back."""
        return self._transfers.cover(member, amount_microcredits)

    def levy(self, amount_microcredits: int) -> None:
        self._levied_microcredits += amount_microcredits

    def divide(self, work: PaidWork, sign: int) -> Changes:
        return self._paid(self._dividends.count(work, sign))

    def date(self, member: bytes, time_ms: int) -> Changes:
        """A node of `member` dated an entry: periods before may pay now."""
        return self._paid(self._dividends.date(member, time_ms))

    def _paid(self, dividends: Changes) -> Changes:
        if not dividends:
            return dividends
        for member, change in dividends.items():
            self._received[member] += change
        return together(dividends, {TREASURY: -sum(dividends.values())})

    def dividends_microcredits(self, member: bytes) -> int:
        """What the member has been paid in dividends."""
        return self._received.get(member, 0)

    def transferable_microcredits(self, member: bytes) -> int:
        """How much more of the member's credit transfers can move."""
        return self._transfers.left_microcredits(member)

    def periods(self) -> list[Period]:
        return self._dividends.periods()

    def totals(self) -> TreasuryTotals:
        return TreasuryTotals(
            issued_microcredits=self._issued_microcredits,
            granted_microcredits=sum(grant for grant, _ in self._grants.values()),
            levied_microcredits=self._levied_microcredits,
            dividends_paid_microcredits=sum(self._received.values()),
            dividends_due_microcredits=sum(
                period.per_member_microcredits * period.num_members
                for period in self._dividends.periods()
                if not period.is_paid
            ),
        )


def together(*parts: Changes) -> Changes:
    changes: defaultdict[bytes, int] = defaultdict(int)
    for part in parts:
        for account, change in part.items():
            changes[account] += change
    return changes
