"""What an entry must fulfil before it counts, as one pure check used when writing, receiving and auditing.

Every rule only ever turns from "no" to "yes" as a node learns more (roster events, earlier entries), so an
entry refused today because something is not known yet is simply offered again, and all replicas end equal.
The order of the checks is cheap before expensive: signatures come last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from ledger.directory import Directory
from ledger.entry import (
    TREASURY,
    AccountOpened,
    Disputed,
    Entry,
    HoldOpened,
    HoldSettled,
    HoldVoided,
    Issued,
    ReceiptClaimed,
    Transferred,
)
from ledger.rate_card import RateCard
from ledger.receipt import Receipt, ReceiptError, SignedReceipt, expected_amount, verify_head, verify_stage
from ledger.session_record import Hold

# Of one route: what a session's receipts cost to count grows with their square.
MAX_NUM_STAGES = 256

# (author, session) -> the holds that this author opened for the session.
HoldsOf = Callable[[bytes, bytes], Collection[Hold]]


class EntryRefused(Exception):
    """The entry breaks a rule; the message is one line that says which."""


def check_entry(
    entry: Entry, pod: bytes, directory: Directory, holds_of: HoldsOf, *, is_signed_here: bool = False
) -> None:
    """Raise EntryRefused unless the entry may count. Its place in the chain is checked elsewhere.

    `is_signed_here`: this process made the author's signature a moment ago.
    """
    _require(entry.pod == pod, "it belongs to another pod")
    _require(directory.member_of_node(entry.author) is not None, "its author is not a node of this pod")
    _check_body(entry, directory, holds_of)
    _require(is_signed_here or entry.is_signed_by_author(), "signature does not match")
    for signed, must_be_co_signed in _receipts_of(entry):
        _check_signatures(signed, must_be_co_signed)


def _check_body(entry: Entry, directory: Directory, holds_of: HoldsOf) -> None:
    body = entry.body
    match body:
        case AccountOpened():
            may_open = directory.may_act_for(entry.author, body.member) or directory.may_issue(entry.author)
            _require(may_open, "its author may not open this account")
            _cards(directory, body.rate_card_version)
        case Issued():
            _require(directory.may_issue(entry.author), "its author may not issue credit")
            _require(body.amount_microcredits > 0, "the amount is not above zero")
        case Transferred():
            _require(body.amount_microcredits > 0, "the amount is not above zero")
            _require(body.from_account != body.to_account, "both accounts are the same")
            is_account = body.to_account == TREASURY or directory.is_member(body.to_account)
            _require(is_account, "the credit would go to nobody of this pod")
            may_act = directory.may_act_for(entry.author, body.from_account)
            _require(may_act, "its author may not move credit out of this account")
        case HoldOpened():
            _require(body.amount_microcredits > 0, "the hold's amount is not above zero")
            _require(body.expires_at_ms > entry.time_ms, "the hold expires before it opens")
            _cards(directory, body.rate_card_version)
            _require(_may_charge(entry, body, directory), "its author may not charge this payer")
        case HoldSettled():
            _check_settlement(entry, body, directory, holds_of(entry.author, body.session))
        case HoldVoided():
            _require(bool(holds_of(entry.author, body.session)), "its author opened no such hold")
        case ReceiptClaimed(receipt=signed):
            _require(signed.receipt.stage == entry.author, "the claimed receipt is another stage's")
            _check_receipt(signed.receipt, entry.pod, directory)
            limit = _limit(signed.receipt, holds_of(signed.receipt.head, signed.receipt.session))
            _require(limit > 0, "its head opened no such hold")
            _require(signed.receipt.amount_microcredits <= limit, "its receipt would exceed the hold")
        case Disputed(receipt=signed) if signed is not None:
            _require(signed.receipt.stage == entry.author, "the disputed receipt is another stage's")
            _require(signed.receipt.session == body.session, "the disputed receipt is another session's")
        case Disputed():
            pass


def _may_charge(entry: Entry, hold: HoldOpened, directory: Directory) -> bool:
    is_own = hold.payer == directory.member_of_node(entry.author) and not hold.authorization
    return is_own or directory.may_charge(entry.author, hold)


def _check_settlement(entry: Entry, body: HoldSettled, directory: Directory, holds: Collection[Hold]) -> None:
    _require(bool(holds), "its author opened no such hold")
    _require(body.num_cached_tokens <= body.num_prompt_tokens, "more cached tokens than prompt tokens")
    for signed in body.receipts:
        receipt = signed.receipt
        _require(receipt.head == entry.author, "a receipt is another head's")
        _require(receipt.session == body.session, "a receipt is another session's")
        _require(_limit(receipt, holds) > 0, "a receipt's payer or key is not the hold's")
        _check_receipt(receipt, entry.pod, directory)
    amount = sum(signed.receipt.amount_microcredits for signed in body.receipts)
    limit = min((_limit(signed.receipt, holds) for signed in body.receipts), default=0)
    _require(amount <= limit, "its receipts would exceed the hold")


def _limit(receipt: Receipt, holds: Collection[Hold]) -> int:
    """The amount that the head held of this payer through this key; 0 if it did not."""
    payer = (receipt.payer, receipt.key_id)
    return max((hold.amount_microcredits for hold in holds if (hold.payer, hold.key_id) == payer), default=0)


def _check_receipt(receipt: Receipt, pod: bytes, directory: Directory) -> None:
    _require(receipt.pod == pod, "a receipt belongs to another pod")
    _require(receipt.stage_index < MAX_NUM_STAGES, "a receipt's place in the route is beyond any route")
    _require(directory.member_of_node(receipt.head) is not None, "a receipt's head is not of this pod")
    _require(directory.member_of_node(receipt.stage) is not None, "a receipt's stage is not of this pod")
    cards = _cards(directory, receipt.rate_card_version)
    is_priced = any(expected_amount(receipt, card) == receipt.amount_microcredits for card in cards)
    _require(is_priced, "a receipt's amount is not the price of its counts")


def _check_signatures(signed: SignedReceipt, must_be_co_signed: bool) -> None:
    try:
        verify_head(signed)
        if must_be_co_signed or signed.is_co_signed:
            verify_stage(signed)
    except ReceiptError as error:
        raise EntryRefused(str(error)) from error


def _receipts_of(entry: Entry) -> list[tuple[SignedReceipt, bool]]:
    """The receipts in an entry, and whether the stage must have co-signed.

    In a claim the stage's signature on the entry itself is its agreement; a disputed receipt lacks it.
    """
    match entry.body:
        case HoldSettled(receipts=receipts):
            return [(signed, True) for signed in receipts]
        case ReceiptClaimed(receipt=signed):
            return [(signed, False)]
        case Disputed(receipt=SignedReceipt() as signed):
            return [(signed, False)]
        case _:
            return []


def _cards(directory: Directory, version: int) -> Sequence[RateCard]:
    cards = directory.rate_cards(version)
    _require(bool(cards), f"rate card {version} is not known")
    return cards


def _require(is_fulfilled: bool, reason: str) -> None:
    if not is_fulfilled:
        raise EntryRefused(reason)
