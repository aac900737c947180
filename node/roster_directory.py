"""The ledger's questions about the pod, answered from the roster.

Answers are permanent, as the ledger asks: former nodes still belong to their members, the rights to issue
and to move the treasury's credit are the owner's, who never changes, and a rate card is known once somebody
published it who had the right to then, even if it was taken back since (`pod/roster/policies.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ledger.entry import TREASURY, HoldOpened
from ledger.rate_card import RateCard
from node.policy import published_rate_cards
from node.sessions.authorization import is_authorized
from pod.roster.roster import Roster


class RosterDirectory:
    """`roster()` is asked anew each time, from any thread: a roster is a frozen value."""

    def __init__(self, roster: Callable[[], Roster]) -> None:
        self._roster = roster
        self._cards: tuple[Roster | None, Mapping[int, tuple[RateCard, ...]]] = (None, {})

    def member_of_node(self, node: bytes) -> bytes | None:
        roster = self._roster()
        known = roster.nodes.get(node) or roster.former_nodes.get(node)
        return known.member if known is not None else None

    def is_member(self, account: bytes) -> bool:
        roster = self._roster()
        return account in roster.members or account in roster.former_members

    def may_issue(self, node: bytes) -> bool:
        return self.member_of_node(node) == self._roster().owner.id

    def may_act_for(self, node: bytes, account: bytes) -> bool:
        member = self.member_of_node(node)
        if account == TREASURY:
            return member == self._roster().owner.id
        return member == account

    def may_charge(self, node: bytes, hold: HoldOpened) -> bool:
        return self.is_member(hold.payer) and is_authorized(self._roster().pod, node, hold)

    def rate_cards(self, version: int) -> tuple[RateCard, ...]:
        roster = self._roster()
        known, cards = self._cards
        if known is not roster:
            cards = published_rate_cards(roster)
            self._cards = (roster, cards)
        return cards.get(version, ())
