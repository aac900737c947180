"""Balances counted once more, from all entries at once and without the books: slow, short, another way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ledger.entry import (
    ISSUANCE,
    TREASURY,
    AccountOpened,
    HoldOpened,
    HoldSettled,
    Issued,
    ReceiptClaimed,
    Transferred,
    decode_entry,
)
from ledger.ledger import Ledger
from ledger.rate_card import DEFAULT_RATE_CARD
from ledger.receipt import Receipt

PERIOD_MS = 1000 * DEFAULT_RATE_CARD.dividend_period_s


@dataclass
class Period:
    """What is divided of one period's levy."""

    dividends: int = 0
    heads: set[bytes] = field(default_factory=set)
    active: set[bytes] = field(default_factory=set)


def balances_of(ledger: Ledger, member_of_node: Mapping[bytes, bytes]) -> dict[bytes, int]:
    """Of every account that is not at 0."""
    entries = [decode_entry(raw) for raw in ledger.missing({}, 1 << 30)[0]]
    moves: list[tuple[bytes, bytes, int]] = []
    opened = {entry.body.member for entry in entries if isinstance(entry.body, AccountOpened)}
    moves += [(TREASURY, member, DEFAULT_RATE_CARD.starter_grant_microcredits) for member in opened]
    held: dict[tuple[bytes, ...], tuple[int, int, int]] = {}
    given: list[tuple[bytes, bytes, int]] = []
    latest_ms: Counter[bytes] = Counter()
    divided: dict[int, Period] = {}
    receipts: list[Receipt] = []
    for entry in entries:
        author = member_of_node[entry.author]
        latest_ms[author] = max(latest_ms[author], entry.time_ms)
        match entry.body:
            case Issued(amount_microcredits=amount):
                moves.append((ISSUANCE, TREASURY, amount))
            case Transferred(from_account=source, to_account=target, amount_microcredits=amount):
                (moves if source == TREASURY else given).append((source, target, amount))
            case HoldOpened(session=session, payer=payer, key_id=key, amount_microcredits=amount):
                place = (entry.author, session, payer, key)
                hold = (amount, entry.body.expires_at_ms, entry.time_ms)
                held[place] = max(held.get(place, hold), hold)
            case HoldSettled(receipts=signed):
                receipts += [one.receipt for one in signed]
            case ReceiptClaimed(receipt=one):
                receipts.append(one.receipt)
            case _:
                pass
    for place, (limit, _, opened_ms) in held.items():
        head, session, payer, key = place
        owed: dict[tuple[int, bytes], Receipt] = {}
        for receipt in receipts:
            if (receipt.head, receipt.session) == (head, session):
                best = owed.setdefault((receipt.stage_index, receipt.stage), receipt)
                if _outranks(receipt, best):
                    owed[receipt.stage_index, receipt.stage] = receipt
        mine = [receipt for receipt in owed.values() if (receipt.payer, receipt.key_id) == (payer, key)]
        total = sum(receipt.amount_microcredits for receipt in mine)
        for receipt in mine:
            amount = receipt.amount_microcredits
            amount = amount if total <= limit else amount * limit // total
            levy = amount * DEFAULT_RATE_CARD.levy_per_mille // 1000
            moves += [
                (payer, member_of_node[receipt.stage], amount - levy),
                (payer, TREASURY, levy),
            ]
            if receipt.num_prompt_tokens + receipt.num_output_tokens:
                period = divided.setdefault(opened_ms // PERIOD_MS, Period())
                period.dividends += levy * DEFAULT_RATE_CARD.dividend_per_mille // 1000
                period.heads.add(member_of_node[head])
                period.active |= {payer, member_of_node[receipt.stage]}
    moves += _given(given, moves, opened)
    for number, period in divided.items():
        late = [head for head in period.heads if latest_ms[head] >= (number + 1) * PERIOD_MS]
        if 2 * len(late) > len(period.heads):
            share = period.dividends // len(period.active)
            moves += [(TREASURY, member, share) for member in period.active]
    balances: Counter[bytes] = Counter()
    for source, target, amount in moves:
        balances[source] -= amount
        balances[target] += amount
    return {account: balance for account, balance in balances.items() if balance}


def _given(
    given: list[tuple[bytes, bytes, int]], moves: list[tuple[bytes, bytes, int]], opened: set[bytes]
) -> list[tuple[bytes, bytes, int]]:
    """What members' transfers move: at most what they were granted, earned or given by the treasury, and
    their credit line.
    """
    found = []
    for giver in {source for source, _, _ in given}:
        mine = [(target, amount) for source, target, amount in given if source == giver]
        written = sum(amount for _, amount in mine)
        cover = sum(amount for _, target, amount in moves if target == giver)
        cover += DEFAULT_RATE_CARD.credit_line_microcredits if giver in opened else 0
        found += [
            (giver, to, amount if written <= cover else amount * cover // written) for to, amount in mine
        ]
    return found


def _outranks(receipt: Receipt, other: Receipt) -> bool:
    return (receipt.sequence, receipt.amount_microcredits, receipt.encode()) > (
        other.sequence,
        other.amount_microcredits,
        other.encode(),
    )
