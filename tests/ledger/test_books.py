"""The projection: order never matters, sums are always 0, each thing counts once."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.books import Books, UnknownPartyError
from ledger.entry import (
    ISSUANCE,
    MAX_TIME_MS,
    TREASURY,
    AccountOpened,
    Body,
    Disputed,
    DisputeReason,
    Entry,
    HoldVoided,
    Issued,
    ReceiptClaimed,
    Transferred,
    VoidReason,
    sign_entry,
)
from ledger.rate_card import DEFAULT_RATE_CARD, RateCard
from ledger.session_record import SessionState
from tests.ledger.world import KEY, POD, START_MS, World, session_id

WORLD = World()
WORLD.directory.cards[2] = RateCard(2, 500, 50, 2_000, 3_000_000, 0, 100)
SECONDS_LATER_MS = START_MS + 1_000
A, B, C = WORLD.members


class Writer:
    """Signs entries one after the other, without a ledger's checks."""

    def __init__(self) -> None:
        self._num = 0

    def entry(self, author: int, body: Body, time_ms: int = START_MS) -> Entry:
        node = WORLD.nodes[author]
        self._num += 1
        return sign_entry(POD, node.public, self._num, bytes(32), time_ms, body, node.sign)


def written(*bodies: tuple[int, Body]) -> list[Entry]:
    writer = Writer()
    return [writer.entry(author, body) for author, body in bodies]


def books_of(entries: list[Entry]) -> Books:
    books = Books(WORLD.directory)
    for entry in entries:
        books.apply(entry)
    return books


def everything(books: Books) -> object:
    sessions = [
        books.session(node.public, session_id(number), SECONDS_LATER_MS)
        for node in WORLD.nodes
        for number in range(4)
    ]
    return (
        books.balances(),
        sorted(books.member_totals().items(), key=lambda item: item[0]),
        sorted(map(str, books.open_holds(SECONDS_LATER_MS))),
        {member: books.available(member, SECONDS_LATER_MS) for member in WORLD.members},
        sessions,
    )


def story() -> list[Entry]:
    """Every kind of entry, with receipts that overtake, repeat and contradict each other."""
    receipts = [
        WORLD.receipt(session_id(1), stage_index=0, stage=1, sequence=3, num_output_tokens=30),
        WORLD.receipt(session_id(1), stage_index=1, stage=2, sequence=3, num_output_tokens=30),
    ]
    earlier = WORLD.receipt(session_id(1), stage_index=0, stage=1, sequence=2, num_output_tokens=12)
    later = WORLD.receipt(session_id(1), stage_index=1, stage=2, sequence=4, num_output_tokens=31)
    twice = WORLD.receipt(session_id(1), stage_index=1, stage=2, sequence=4, num_output_tokens=29)
    other_head = WORLD.receipt(session_id(1), head=1, payer=1, stage=2, rate_card_version=2)
    return written(
        (0, AccountOpened(A, 1)),
        (1, AccountOpened(A, 2)),
        (1, AccountOpened(B, 2)),
        (0, Issued(50_000_000)),
        (0, Transferred(TREASURY, C, 3_000_000)),
        (2, Transferred(C, A, 1_000_000)),
        (0, WORLD.hold(session_id(1))),
        (0, WORLD.settlement(session_id(1), *receipts)),
        (0, HoldVoided(session_id(1), VoidReason.FAILED)),
        (1, ReceiptClaimed(WORLD.head_signed(earlier))),
        (2, ReceiptClaimed(WORLD.head_signed(later))),
        (2, ReceiptClaimed(WORLD.co_signed(twice))),
        (1, WORLD.hold(session_id(1), payer=1)),
        (1, WORLD.hold(session_id(1), payer=2, amount_microcredits=5)),
        (2, ReceiptClaimed(WORLD.head_signed(other_head))),
        (1, WORLD.hold(session_id(1), payer=1, amount_microcredits=900_000)),
        (0, WORLD.hold(session_id(2), payer=1)),
        (0, HoldVoided(session_id(2), VoidReason.CANCELLED)),
        (0, WORLD.hold(session_id(3), payer=2)),
        (2, Disputed(session_id(3), DisputeReason.UNSIGNED_LIMIT)),
        (2, Disputed(session_id(1), DisputeReason.COUNTS, WORLD.head_signed(later))),
    )


STORY = story()
EXPECTED = everything(books_of(STORY))


@settings(max_examples=300, deadline=None)
@given(st.permutations(STORY))
def test_the_order_of_entries_leaves_no_trace(entries: list[Entry]) -> None:
    books = Books(WORLD.directory)
    for entry in entries:
        assert sum(posting.amount_microcredits for posting in books.apply(entry)) == 0
        assert sum(books.balances().values()) == 0
    assert everything(books) == EXPECTED


def test_the_starter_grant_is_paid_once_by_the_treasury() -> None:
    books = books_of(written((0, AccountOpened(A, 1)), (1, AccountOpened(A, 1, b"again"))))
    grant = DEFAULT_RATE_CARD.starter_grant_microcredits
    assert books.balances() == {TREASURY: -grant, ISSUANCE: 0, A: grant}
    assert books.is_account_open(A)
    assert not books.is_account_open(B)


def test_a_settlement_pays_the_stages_and_the_levy() -> None:
    receipts = [WORLD.receipt(session_id(1), stage_index=index, stage=index) for index in range(3)]
    amount = receipts[0].amount_microcredits
    levy = DEFAULT_RATE_CARD.levy(amount)
    assert (amount, levy) == (1_350_000, 27_000)
    books = books_of(written((0, WORLD.hold(session_id(1))), (0, WORLD.settlement(session_id(1), *receipts))))
    assert books.balance(A) == -3 * amount + (amount - levy)
    assert books.balance(B) == books.balance(C) == amount - levy
    assert books.balance(TREASURY) == 3 * levy
    totals = books.member_totals()
    assert (totals[A].num_prompt_tokens_consumed, totals[A].num_output_tokens_consumed) == (10, 20)
    assert (totals[B].num_prompt_tokens_served, totals[B].num_output_tokens_served) == (10, 20)
    assert (totals[A].microcredits_spent, totals[B].microcredits_earned) == (3 * amount, amount - levy)


def test_a_receipt_in_settle_and_claim_counts_once() -> None:
    receipt = WORLD.receipt(session_id(1))
    settled = written((0, WORLD.hold(session_id(1))), (0, WORLD.settlement(session_id(1), receipt)))
    claimed = [*settled, *written((1, ReceiptClaimed(WORLD.head_signed(receipt))))]
    assert everything(books_of(claimed)) == everything(books_of(settled))


def test_a_session_never_pays_more_than_its_hold() -> None:
    """Claims one by one are within the hold; together they share it, in whatever order they come."""
    first = WORLD.receipt(session_id(1), stage=1)
    second = WORLD.receipt(session_id(1), stage=2, num_output_tokens=50, stage_index=1)
    total = first.amount_microcredits + second.amount_microcredits
    held = second.amount_microcredits
    entries = written(
        (0, WORLD.hold(session_id(1), amount_microcredits=held)),
        (1, ReceiptClaimed(WORLD.head_signed(first))),
        (2, ReceiptClaimed(WORLD.head_signed(second))),
    )
    for order in permutations(entries):
        books = books_of(list(order))
        shares = [held * receipt.amount_microcredits // total for receipt in (first, second)]
        assert books.balance(A) == -sum(shares)
        assert books.balance(B) == shares[0] - DEFAULT_RATE_CARD.levy(shares[0])
        assert books.balance(C) == shares[1] - DEFAULT_RATE_CARD.levy(shares[1])
        assert held - 2 < sum(shares) <= held
        summary = books.session(WORLD.nodes[0].public, session_id(1), START_MS)
        assert summary is not None
        assert summary.amount_microcredits == sum(shares)


def test_without_a_hold_nothing_is_paid() -> None:
    receipt = WORLD.receipt(session_id(1))
    entries = written(
        (0, WORLD.hold(session_id(1), payer=1)), (1, ReceiptClaimed(WORLD.head_signed(receipt)))
    )
    assert books_of(entries).balance(A) == 0


def test_a_lower_sequence_does_nothing_and_a_higher_one_replaces() -> None:
    low = WORLD.receipt(session_id(1), sequence=1, num_output_tokens=5)
    high = WORLD.receipt(session_id(1), sequence=2, num_output_tokens=9)
    claims = [(1, ReceiptClaimed(WORLD.head_signed(receipt))) for receipt in (low, high, low)]
    books = books_of(written((0, WORLD.hold(session_id(1))), *claims))
    assert books.balance(A) == -high.amount_microcredits
    assert books.counts(high)
    assert not books.counts(low)
    totals = books.member_totals()
    assert totals[A].num_output_tokens_consumed == totals[B].num_output_tokens_served == 9


def test_a_head_cannot_take_back_a_stages_pay_with_a_receipt_for_another_node() -> None:
    first = WORLD.receipt(session_id(1), stage=1, sequence=1)
    second = WORLD.receipt(session_id(1), stage=2, sequence=9)
    books = books_of(
        written(
            (0, WORLD.hold(session_id(1))),
            (1, ReceiptClaimed(WORLD.head_signed(first))),
            (2, ReceiptClaimed(WORLD.head_signed(second))),
        )
    )
    assert books.balance(B) == books.balance(C) > 0


def test_open_holds_lower_what_is_available_until_resolved_or_expired() -> None:
    hold = WORLD.hold(session_id(1), amount_microcredits=700)
    opened = written((0, hold))
    books = books_of(opened)
    assert books.available(A, START_MS) == -700
    assert [found.session for found in books.open_holds(hold.expires_at_ms - 1)] == [session_id(1)]
    assert books.open_holds(hold.expires_at_ms) == []
    assert books.available(A, hold.expires_at_ms) == 0
    books.apply(Writer().entry(0, HoldVoided(session_id(1), VoidReason.FAILED)))
    assert books.open_holds(START_MS) == []
    assert books.available(A, START_MS) == 0


@pytest.mark.parametrize("is_void_first", [True, False])
def test_the_first_resolution_in_the_journal_counts(is_void_first: bool) -> None:
    receipt = WORLD.receipt(session_id(1))
    settle, void = WORLD.settlement(session_id(1), receipt), HoldVoided(session_id(1), VoidReason.FAILED)
    bodies: list[Body] = [void, settle] if is_void_first else [settle, void]
    opened, *resolved = written((0, WORLD.hold(session_id(1))), *((0, body) for body in bodies))
    summaries = [
        books_of([opened, *order]).session(WORLD.nodes[0].public, session_id(1), START_MS)
        for order in (resolved, resolved[::-1])
    ]
    assert summaries[0] == summaries[1]
    assert summaries[0] is not None
    assert summaries[0].state is (SessionState.VOIDED if is_void_first else SessionState.SETTLED)
    assert summaries[0].amount_microcredits == receipt.amount_microcredits


def test_a_hold_expires_once_and_a_late_settlement_still_pays() -> None:
    hold, receipt, writer = WORLD.hold(session_id(1)), WORLD.receipt(session_id(1)), Writer()
    opened = writer.entry(0, hold)
    late = writer.entry(0, WORLD.settlement(session_id(1), receipt), time_ms=hold.expires_at_ms)
    books = books_of([opened, late])
    summary = books.session(WORLD.nodes[0].public, session_id(1), hold.expires_at_ms)
    assert summary is not None
    assert summary.state is SessionState.EXPIRED
    assert books.balance(A) == -receipt.amount_microcredits


def test_a_session_summary_says_who_paid_and_who_served() -> None:
    receipts = [WORLD.receipt(session_id(1), stage_index=index, stage=index + 1) for index in range(2)]
    books = books_of(written((0, WORLD.hold(session_id(1))), (0, WORLD.settlement(session_id(1), *receipts))))
    (summary,) = books.recent_sessions(5, START_MS)
    assert (summary.payer, summary.key_id, summary.state) == (A, KEY, SessionState.SETTLED)
    assert (summary.num_prompt_tokens, summary.num_output_tokens) == (10, 20)
    assert [(stage.node, stage.start_layer, stage.end_layer) for stage in summary.stages] == [
        (WORLD.nodes[1].public, 0, 10),
        (WORLD.nodes[2].public, 10, 20),
    ]
    assert books.recent_sessions(0, START_MS) == []


def test_recent_sessions_are_newest_first() -> None:
    writer = Writer()
    times = {1: START_MS + 5, 2: START_MS + 9, 3: START_MS + 7}
    books = books_of([writer.entry(0, WORLD.hold(session_id(n)), time_ms=ms) for n, ms in times.items()])
    recent = books.recent_sessions(2, START_MS)
    assert [summary.session for summary in recent] == [session_id(2), session_id(3)]


def test_a_session_from_the_far_future_is_not_the_newest_for_ever() -> None:
    writer = Writer()
    times = {1: START_MS, 2: MAX_TIME_MS - 1, 3: START_MS + 2}
    books = books_of([writer.entry(0, dated_hold(n, ms), time_ms=ms) for n, ms in times.items()])
    recent = [summary.session for summary in books.recent_sessions(3, START_MS + 2)]
    assert recent == [session_id(3), session_id(1), session_id(2)]
    assert [summary.session for summary in books.recent_sessions(1, START_MS)] == [session_id(3)]


def dated_hold(number: int, time_ms: int) -> Body:
    return replace(WORLD.hold(session_id(number)), expires_at_ms=time_ms + 1)


def test_an_unknown_party_changes_nothing() -> None:
    receipt = WORLD.receipt(session_id(1), rate_card_version=2)
    (claim,) = written((1, ReceiptClaimed(WORLD.head_signed(receipt))))
    stranger = World()
    books = Books(stranger.directory)
    before = everything(books)
    with pytest.raises(UnknownPartyError, match="rate card 2"):
        books.apply(claim)
    assert everything(books) == before
