"""What every member weighs in the queues now: balances and roster become weights, for head and engine.

Kept up to date a moment after balances or members changed; what a balance means is `ledger/standing.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from ledger.ledger import Ledger
from ledger.rate_card import MICROCREDITS_PER_CREDIT, RateCard
from ledger.standing import is_past_credit_line, weight_per_mille
from node.engine.messages import MemberStanding
from node.gateway.backend import QuotaExceeded
from node.ledger_thread import LedgerThread
from node.policy import rate_card_of
from pod.roster.roster import Roster


class Standings:
    def __init__(
        self, node: bytes, ledger: LedgerThread, roster: Callable[[], Roster], clock_ms: Callable[[], int]
    ) -> None:
        self._node = node
        self._ledger = ledger
        self._roster = roster
        self._clock_ms = clock_ms
        self._weights: dict[bytes, int] = {}

    def weight_of(self, member: bytes) -> int:
        """Per mille; the floor of a member that joined this moment."""
        return self._weights.get(member) or rate_card_of(self._roster()).floor_per_mille

    def own_member(self) -> bytes | None:
        return self._roster().member_of_node(self._node)

    async def refresh(self) -> tuple[MemberStanding, ...]:
        """All members as they stand now."""
        balances = await self._ledger.run(lambda ledger: ledger.balances())
        standings = standings_of(self._roster(), balances)
        self._weights = {standing.member: standing.weight_per_mille for standing in standings}
        return standings

    def check_credit(self, member: bytes) -> None:
        """For a request that has to wait, because others want the pod too. Raises QuotaExceeded."""
        check_credit(self._ledger.ledger, member, rate_card_of(self._roster()), self._clock_ms())


def check_credit(ledger: Ledger, member: bytes, card: RateCard, now_ms: int) -> None:
    """Raises QuotaExceeded when a member's balance, less what is held for its requests at any gateway, is
    past the credit line.
    """
    available, balance = ledger.available(member), ledger.balance(member)
    if is_past_credit_line(available, card):
        raise QuotaExceeded(quota_text(balance, balance - available, card, now_ms))


def standings_of(roster: Roster, balances: Mapping[bytes, int]) -> tuple[MemberStanding, ...]:
    card = rate_card_of(roster)
    nodes: dict[bytes, list[bytes]] = {member: [] for member in roster.members}
    for node in roster.nodes.values():
        nodes.setdefault(node.member, []).append(node.id)
    return tuple(
        MemberStanding(
            member,
            weight_per_mille(balances.get(member, 0), card),
            is_past_credit_line(balances.get(member, 0), card),
            tuple(own),
        )
        for member, own in nodes.items()
    )


def quota_text(balance_microcredits: int, held_microcredits: int, card: RateCard, now_ms: int) -> str:
    line = -card.credit_line_microcredits
    missing = line - balance_microcredits + held_microcredits
    held = f" and {_credits(held_microcredits)} of it held for open requests" if held_microcredits else ""
    text = (
        f"the pod is busy and your balance is {_credits(balance_microcredits)} credits{held}, past the "
        f"credit line of {_credits(line)}; it refills by {_credits(missing)} when your requests end for less "
        "than they hold, your machines serve others or somebody transfers credit to you"
    )
    if card.dividend_per_mille and card.levy_per_mille:
        period_ms = card.dividend_period_s * 1000
        next_s = (now_ms // period_ms + 1) * card.dividend_period_s
        text += f", and with the dividend of {datetime.fromtimestamp(next_s, UTC):%Y-%m-%d %H:%M} UTC"
    return f"{text}; while the pod is idle you are served all the same"


def _credits(microcredits: int) -> str:
    return f"{microcredits / MICROCREDITS_PER_CREDIT:.2f}"
