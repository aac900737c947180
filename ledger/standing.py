"""Standing: a member's balance as its weight in the queue. Pure; the counters it weighs are elsewhere.

A member at its starter grant (it has given what it took) stands in the middle. Who served more goes up, to
1000 per mille at twice the way from the credit line to the grant; who used more goes down, to the floor at
the line.
"""

from __future__ import annotations

from ledger.rate_card import PER_MILLE, RateCard


def weight_per_mille(balance_microcredits: int, card: RateCard) -> int:
    """From the card's floor at the credit line or below it, to 1000."""
    floor = card.floor_per_mille
    above_line = balance_microcredits + card.credit_line_microcredits
    span = 2 * (card.starter_grant_microcredits + card.credit_line_microcredits)
    if above_line <= 0:
        return PER_MILLE if span == 0 and above_line == 0 else floor
    if above_line >= span:
        return PER_MILLE
    return floor + (PER_MILLE - floor) * above_line // span


def is_past_credit_line(balance_microcredits: int, card: RateCard) -> bool:
    """Whether a contended pod refuses this member."""
    return balance_microcredits < -card.credit_line_microcredits
