"""The ledger with names instead of ids: accounts and sessions as command line and dashboard show them.

Reads only; both show the same integers because both ask here.
"""

from __future__ import annotations

from dataclasses import dataclass

from ledger.books import MemberTotals, SessionSummary
from ledger.entry import ISSUANCE, TREASURY
from ledger.ledger import Ledger
from node.links.frames import Stage
from node.placement.route import route_text
from pod.roster.roster import Roster


@dataclass(frozen=True, slots=True)
class AccountRow:
    """`role` is a member's role, "removed", or "" for treasury and issuance."""

    account: bytes
    name: str
    role: str
    balance_microcredits: int
    totals: MemberTotals

    @property
    def num_served_tokens(self) -> int:
        return self.totals.num_prompt_tokens_served + self.totals.num_output_tokens_served

    @property
    def num_consumed_tokens(self) -> int:
        return self.totals.num_prompt_tokens_consumed + self.totals.num_output_tokens_consumed


def account_rows(ledger: Ledger, roster: Roster) -> list[AccountRow]:
    """All members, also former ones with an account, then treasury and issuance: the rows sum to 0."""
    balances, totals = ledger.balances(), ledger.member_totals()
    order = [member.id for member in sorted(roster.members.values(), key=lambda m: (m.joined_ms, m.name))]
    others = sorted((balances.keys() | totals.keys()) - set(order) - {TREASURY, ISSUANCE})
    rows = [
        AccountRow(
            account,
            member_name(roster, account),
            roster.members[account].role.name.lower() if account in roster.members else "removed",
            balances.get(account, 0),
            totals.get(account, MemberTotals()),
        )
        for account in (*order, *others)
    ]
    pots = [
        AccountRow(account, account.decode(), "", balances.get(account, 0), MemberTotals())
        for account in (TREASURY, ISSUANCE)
    ]
    return rows + pots


def member_name(roster: Roster, member: bytes) -> str:
    known = roster.members.get(member) or roster.former_members.get(member)
    return known.name if known is not None else member.hex()[:8]


def node_name(roster: Roster, node: bytes) -> str:
    known = roster.nodes.get(node) or roster.former_nodes.get(node)
    return known.name if known is not None else node.hex()[:8]


def frozen_names(ledger: Ledger, roster: Roster) -> list[str]:
    """Nodes that signed two histories, `node (member)`: their entries are proof, no work goes to them."""
    names = []
    for node in ledger.frozen_authors():
        known = roster.nodes.get(node) or roster.former_nodes.get(node)
        owner = member_name(roster, known.member) if known is not None else "unknown"
        names.append(f"{node_name(roster, node)} ({owner})")
    return sorted(names)


def model_name(roster: Roster, model: bytes) -> str:
    return next((known.name for known in roster.models.values() if known.id == model), model.hex()[:12])


def session_route_text(roster: Roster, summary: SessionSummary) -> str:
    """`name[0:10),…` of the stages that were paid."""
    stages = [Stage(s.node, "", s.start_layer, s.end_layer) for s in summary.stages]
    return route_text(stages, {s.node: node_name(roster, s.node) for s in stages})


def sum_microcredits(rows: list[AccountRow]) -> int:
    return sum(row.balance_microcredits for row in rows)
