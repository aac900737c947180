"""What the operations of the command line work on: membership, ledger and - while a node runs - its state.

`open_offline` and `create_pod` serve commands that run while no node does; a running node has its own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ledger.entry import AccountOpened, Issued
from ledger.ledger import Ledger
from ledger.rate_card import DEFAULT_RATE_CARD, MICROCREDITS_PER_CREDIT
from node.catalogue import Catalogue
from node.errors import UserError
from node.home import PodHome
from node.ledger_thread import LedgerThread
from node.pod_state import PodState
from node.roster_directory import RosterDirectory
from pod.membership import Membership

# What the treasury starts with: starter grants for a thousand members.
INITIAL_ISSUE_MICROCREDITS = 1_000_000 * MICROCREDITS_PER_CREDIT


def wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class Office:
    """`state` and `running` are None while the node does not run."""

    home: PodHome
    membership: Membership
    ledger: LedgerThread
    catalogue: Catalogue
    state: PodState

    def close(self) -> None:
        self.ledger.close()


def open_ledger(home: PodHome, membership: Membership) -> LedgerThread:
    """The ledger of this node, its member's account opened."""
    roster = membership.roster
    directory = RosterDirectory(lambda: membership.roster)
    ledger = Ledger.open(
        home.ledger_url, roster.pod, directory, membership.node_id, membership.node_key.sign, wall_clock_ms
    )
    if roster.owner.id == membership.member_id and ledger.num_entries() == 0:
        ledger.append(Issued(INITIAL_ISSUE_MICROCREDITS))
    if not ledger.is_account_open(membership.member_id):
        ledger.append(AccountOpened(membership.member_id, DEFAULT_RATE_CARD.version))
    return LedgerThread(ledger)
