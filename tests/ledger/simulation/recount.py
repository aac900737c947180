"""Balances counted once more, from all entries at once and without the books: slow, short, another way."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from ledger.entry import (
    ISSUANCE,
    TREASURY,
    AccountOpened,
    Entry,
    HoldOpened,
    HoldSettled,
    Issued,
    ReceiptClaimed,
    Transferred,
    decode_entry,
)
from ledger.ledger import Ledger
from ledger.receipt import Receipt
from tests.ledger.simulation.people import CARD

PERIOD_MS = 1000 * CARD.dividend_period_s


@dataclass(frozen=True, slots=True)
class Paid:
    receipt: Receipt
    opened_ms: int
    amount: int

    @property
    def levy(self) -> int:
        return self.amount * CARD.levy_per_mille // 1000


def balances_of(ledger: Ledger, member_of_node: Mapping[bytes, bytes]) -> dict[bytes, int]:
    """Of every account that is not at 0."""
    entries = [decode_entry(raw) for raw in ledger.missing({}, 1 << 30)[0]]
    payments = _payments(entries)
    balances: Counter[bytes] = Counter()
    cover: Counter[bytes] = Counter()
    for member in {entry.body.member for entry in entries if isinstance(entry.body, AccountOpened)}:
        _move(balances, TREASURY, member, CARD.starter_grant_microcredits)
        cover[member] += CARD.starter_grant_microcredits + CARD.credit_line_microcredits
    for paid in payments:
        server = member_of_node[paid.receipt.stage]
        _move(balances, paid.receipt.payer, server, paid.amount - paid.levy)
        _move(balances, paid.receipt.payer, TREASURY, paid.levy)
        cover[server] += paid.amount - paid.levy
    for entry in entries:
        if isinstance(entry.body, Issued):
            _move(balances, ISSUANCE, TREASURY, entry.body.amount_microcredits)
    for member, amount in _dividends(entries, payments, member_of_node).items():
        _move(balances, TREASURY, member, amount)
    _transfer(balances, cover, [entry.body for entry in entries if isinstance(entry.body, Transferred)])
    return {account: balance for account, balance in balances.items() if balance}


def _move(balances: Counter[bytes], source: bytes, target: bytes, amount: int) -> None:
    balances[source] -= amount
    balances[target] += amount


def _payments(entries: list[Entry]) -> list[Paid]:
    """Per hold the best receipt of each stage, within the hold."""
    holds: dict[tuple[bytes, ...], tuple[int, int, int]] = {}
    best: dict[tuple[object, ...], Receipt] = {}
    for entry in entries:
        match entry.body:
            case HoldOpened() as hold:
                place = (entry.author, hold.session, hold.payer, hold.key_id)
                rank = (hold.amount_microcredits, hold.expires_at_ms, entry.time_ms)
                holds[place] = max(holds.get(place, rank), rank)
            case HoldSettled(receipts=signed):
                for one in signed:
                    _keep_best(best, one.receipt)
            case ReceiptClaimed(receipt=one):
                _keep_best(best, one.receipt)
            case _:
                pass
    payments = []
    for place, (limit, _, opened_ms) in holds.items():
        mine = [receipt for receipt in best.values() if place == _hold_of(receipt)]
        total = sum(receipt.amount_microcredits for receipt in mine)
        for receipt in mine:
            owed = receipt.amount_microcredits
            payments.append(Paid(receipt, opened_ms, owed if total <= limit else owed * limit // total))
    return payments


def _hold_of(receipt: Receipt) -> tuple[bytes, ...]:
    return receipt.head, receipt.session, receipt.payer, receipt.key_id


def _keep_best(best: dict[tuple[object, ...], Receipt], receipt: Receipt) -> None:
    place = (receipt.head, receipt.session, receipt.stage_index, receipt.stage)
    best[place] = max(
        best.get(place, receipt),
        receipt,
        key=lambda one: (one.sequence, one.amount_microcredits, one.encode()),
    )


def _dividends(
    entries: list[Entry], payments: list[Paid], member_of_node: Mapping[bytes, bytes]
) -> Counter[bytes]:
    """Per period: equal parts of its levy's share, once most of those who opened its sessions wrote later."""
    latest_ms: Counter[bytes] = Counter()
    for entry in entries:
        member = member_of_node[entry.author]
        latest_ms[member] = max(latest_ms[member], entry.time_ms)
    periods: defaultdict[int, list[Paid]] = defaultdict(list)
    for paid in payments:
        if paid.receipt.num_prompt_tokens + paid.receipt.num_output_tokens:
            periods[paid.opened_ms // PERIOD_MS].append(paid)
    received: Counter[bytes] = Counter()
    for number, of_period in periods.items():
        heads = {member_of_node[paid.receipt.head] for paid in of_period}
        active = {paid.receipt.payer for paid in of_period} | {
            member_of_node[paid.receipt.stage] for paid in of_period
        }
        num_past = sum(latest_ms[head] >= (number + 1) * PERIOD_MS for head in heads)
        if 2 * num_past > len(heads):
            pot = sum(paid.levy * CARD.dividend_per_mille // 1000 for paid in of_period)
            received.update(dict.fromkeys(active, pot // len(active)))
    return received


def _transfer(balances: Counter[bytes], cover: Counter[bytes], transfers: list[Transferred]) -> None:
    """Each in full, or what one account gave to each other in proportion to what covers all."""
    for one in transfers:
        if one.from_account == TREASURY:
            cover[one.to_account] += one.amount_microcredits
    written: Counter[bytes] = Counter()
    between: Counter[tuple[bytes, bytes]] = Counter()
    for one in transfers:
        written[one.from_account] += one.amount_microcredits
        between[one.from_account, one.to_account] += one.amount_microcredits
    for (source, target), amount in between.items():
        if source != TREASURY and written[source] > cover[source]:
            amount = amount * cover[source] // written[source]
        _move(balances, source, target, amount)
