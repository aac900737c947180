"""What the ledger asks about the pod, as a port; the node answers from the roster.

Answers must be permanent: a node removed from the pod still belongs to its member here, because its old
entries stay in the books. Only then do all replicas decide the same about the same entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ledger.entry import HoldOpened
from ledger.rate_card import RateCard


class Directory(Protocol):
    def member_of_node(self, node: bytes) -> bytes | None:
        """The member whose node this is or was; None for a stranger."""

    def is_member(self, account: bytes) -> bool:
        """Whether this account is that of somebody who is or was a member."""

    def may_issue(self, node: bytes) -> bool:
        """Whether this node's entries may create credit."""

    def may_act_for(self, node: bytes, account: bytes) -> bool:
        """Whether this node's entries may open this account or move credit out of it (also `treasury`)."""

    def may_charge(self, node: bytes, hold: HoldOpened) -> bool:
        """Whether `hold.authorization` shows that the payer lets this node open this hold."""

    def rate_cards(self, version: int) -> Sequence[RateCard]:
        """The published rate cards of that version: none when it is not known, else one, for good.

        A version depends on what its card says. There is more than one only when somebody with the right to
        publish searched for a second card with the same version. Entries with the price of either are sound
        then, everywhere. There may come to be more later, never fewer.
        """
