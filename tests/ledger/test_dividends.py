"""Dividends: the same in any order, at most the period's share of its levy, closed by no clock alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.books import Books
from ledger.dividends import Changes, Dividends, PaidWork, Period
from ledger.entry import (
    MAX_TIME_MS,
    TREASURY,
    AccountOpened,
    Body,
    Entry,
    HoldOpened,
    HoldVoided,
    ReceiptClaimed,
    VoidReason,
    sign_entry,
)
from ledger.rate_card import DEFAULT_RATE_CARD
from tests.ledger.world import POD, World, session_id

WORLD = World()
A, B, C = WORLD.members
WEEK_MS = 7 * 86_400_000
WEEK = 3_000
START_MS = WEEK * WEEK_MS
DAILY = 2
WORLD.directory.cards[DAILY] = replace(
    DEFAULT_RATE_CARD, version=DAILY, levy_per_mille=100, dividend_per_mille=1_000, dividend_period_s=86_400
)


class Writer:
    """Signs entries without a ledger's checks."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def write(self, author: int, body: Body, time_ms: int) -> Entry:
        node = WORLD.nodes[author]
        entry = sign_entry(POD, node.public, len(self.entries), bytes(32), time_ms, body, node.sign)
        self.entries.append(entry)
        return entry

    def session(
        self, number: int, head: int, server: int, time_ms: int, payer: int | None = None, version: int = 1
    ) -> int:
        """A session of `head` at `server`, settled at once. Returns its price in microcredits."""
        payer = head if payer is None else payer
        hold = WORLD.hold(session_id(number), payer=payer, head=head)
        self.write(head, replace(hold, expires_at_ms=time_ms + 60_000), time_ms)
        receipt = WORLD.receipt(
            session_id(number), head=head, stage=server, payer=payer, rate_card_version=version
        )
        self.write(head, WORLD.settlement(session_id(number), receipt), time_ms + 1)
        return receipt.amount_microcredits

    def later(self, author: int, time_ms: int) -> Entry:
        """An entry that does nothing but to have a date."""
        return self.write(author, HoldVoided(session_id(0), VoidReason.FAILED), time_ms)


def books_of(entries: list[Entry]) -> Books:
    books = Books(WORLD.directory)
    for entry in entries:
        books.apply(entry)
        assert sum(books.balances().values()) == 0
    return books


def dividends_of(entries: list[Entry]) -> dict[bytes, int]:
    return {
        member: totals.microcredits_dividends for member, totals in books_of(entries).member_totals().items()
    }


def two_heads() -> Writer:
    """In one week A's node opens two sessions and B's one; C serves one of them."""
    writer = Writer()
    writer.session(1, head=0, server=1, time_ms=START_MS)
    writer.session(2, head=0, server=2, time_ms=START_MS + 5_000)
    writer.session(3, head=1, server=0, time_ms=START_MS + 9_000)
    return writer


def test_a_period_pays_equal_parts_once_most_of_its_heads_are_past_it() -> None:
    writer = two_heads()
    amount = WORLD.receipt(session_id(1)).amount_microcredits
    dividend = 3 * DEFAULT_RATE_CARD.dividend(DEFAULT_RATE_CARD.levy(amount))
    assert set(dividends_of(writer.entries).values()) == {0}
    assert books_of(writer.entries).treasury().dividends_due_microcredits == dividend // 3 * 3
    writer.later(0, START_MS + WEEK_MS)
    assert set(dividends_of(writer.entries).values()) == {0}
    writer.later(1, START_MS + WEEK_MS)
    assert dividends_of(writer.entries) == dict.fromkeys((A, B, C), dividend // 3)
    books = books_of(writer.entries)
    assert books.treasury().dividends_paid_microcredits == dividend // 3 * 3
    assert books.balance(TREASURY) == books.treasury().levied_microcredits - dividend // 3 * 3
    assert books.dividend_periods() == [
        Period(
            START_MS,
            START_MS + WEEK_MS,
            dividend,
            num_members=3,
            per_member_microcredits=dividend // 3,
            is_paid=True,
        )
    ]


@pytest.mark.parametrize("time_ms", [START_MS + WEEK_MS, MAX_TIME_MS])
def test_entries_of_the_far_future_close_no_period_of_others(time_ms: int) -> None:
    writer = two_heads()
    for _ in range(5):
        writer.later(0, time_ms)
        writer.later(2, time_ms)
    assert set(dividends_of(writer.entries).values()) == {0}


def test_who_opened_no_session_in_a_period_has_no_say_in_its_end() -> None:
    writer = Writer()
    writer.session(1, head=0, server=1, time_ms=START_MS)
    writer.later(1, MAX_TIME_MS)
    assert set(dividends_of(writer.entries).values()) == {0}
    writer.later(0, START_MS + WEEK_MS)
    assert dividends_of(writer.entries)[B] > 0


def test_the_last_moment_of_a_period_is_in_it() -> None:
    writer = Writer()
    writer.session(1, head=0, server=1, time_ms=START_MS)
    writer.later(0, START_MS + WEEK_MS - 1)
    assert dividends_of(writer.entries)[A] == 0
    writer.later(0, START_MS + WEEK_MS)
    assert dividends_of(writer.entries)[A] > 0


def test_late_entries_divide_the_period_anew() -> None:
    writer = Writer()
    amount = writer.session(1, head=0, server=1, time_ms=START_MS)
    writer.later(0, START_MS + WEEK_MS)
    writer.later(1, START_MS + WEEK_MS)
    whole = DEFAULT_RATE_CARD.dividend(DEFAULT_RATE_CARD.levy(amount))
    assert dividends_of(writer.entries) == {A: whole // 2, B: whole // 2}
    writer.session(2, head=1, server=2, time_ms=START_MS + 1)
    assert dividends_of(writer.entries) == dict.fromkeys((A, B, C), 2 * whole // 3)


def test_a_session_from_before_a_period_is_not_of_it() -> None:
    """The date of the hold decides, not of the settlement."""
    writer = Writer()
    hold = WORLD.hold(session_id(1))
    writer.write(0, replace(hold, expires_at_ms=START_MS + 60_000), START_MS - 1)
    writer.write(0, WORLD.settlement(session_id(1), WORLD.receipt(session_id(1))), START_MS + 5)
    assert dividends_of(writer.entries)[B] > 0
    (period,) = books_of(writer.entries).dividend_periods()
    assert (period.end_ms, period.is_paid) == (START_MS, True)


def test_each_card_says_how_long_its_periods_are_and_what_is_paid_out() -> None:
    writer = Writer()
    amount = writer.session(1, head=0, server=1, time_ms=START_MS, version=DAILY)
    writer.later(0, START_MS + 86_400_000)
    levy = WORLD.directory.cards[DAILY].levy(amount)
    assert dividends_of(writer.entries) == {A: levy // 2, B: levy // 2}
    writer.session(2, head=0, server=2, time_ms=START_MS + 1)
    assert dividends_of(writer.entries)[C] == 0
    assert [period.end_ms - period.start_ms for period in books_of(writer.entries).dividend_periods()] == [
        WEEK_MS,
        86_400_000,
    ]


def test_without_a_hold_or_a_token_nobody_was_active() -> None:
    writer = Writer()
    writer.session(1, head=0, server=1, time_ms=START_MS)
    idle = WORLD.receipt(session_id(2), stage=2, num_prompt_tokens=0, num_output_tokens=0)
    hold: HoldOpened = replace(WORLD.hold(session_id(2)), expires_at_ms=START_MS + 60_000)
    writer.write(0, hold, START_MS)
    writer.write(0, WORLD.settlement(session_id(2), idle), START_MS + 1)
    unheld = WORLD.receipt(session_id(3), head=1, stage=2, payer=2)
    writer.write(2, ReceiptClaimed(WORLD.head_signed(unheld)), START_MS + 1)
    writer.later(0, START_MS + WEEK_MS)
    assert dividends_of(writer.entries).get(C, 0) == 0
    assert dividends_of(writer.entries)[A] == dividends_of(writer.entries)[B] > 0


def a_long_story() -> list[Entry]:
    """Three weeks, late and early dates, a claim above a settlement, a forked head's hold, two cards."""
    writer = Writer()
    writer.write(0, AccountOpened(A, 1), START_MS)
    for number, (head, server, days) in enumerate(
        [
            (0, 1, 0),
            (1, 2, 1),
            (0, 2, 6),
            (1, 0, 7),
            (2, 0, 8),
            (0, 0, 14),
            (1, 2, 15),
            (2, 1, 40),
            (0, 1, 3),
        ],
        1,
    ):
        version = DAILY if number % 3 == 0 else 1
        writer.session(number, head, server, START_MS + days * 86_400_000, version=version)
    more = WORLD.receipt(session_id(1), stage=1, sequence=9, num_output_tokens=70)
    writer.write(1, ReceiptClaimed(WORLD.head_signed(more)), START_MS + 20 * 86_400_000)
    second = replace(WORLD.hold(session_id(3)), amount_microcredits=20_000_000, expires_at_ms=MAX_TIME_MS)
    writer.write(0, second, START_MS + 9 * 86_400_000)
    writer.later(2, MAX_TIME_MS)
    return writer.entries


STORY = a_long_story()


def outcome(books: Books) -> object:
    return (
        books.balances(),
        {member: totals.microcredits_dividends for member, totals in books.member_totals().items()},
        books.treasury(),
        books.dividend_periods(),
    )


EXPECTED = outcome(books_of(STORY))


def test_the_story_pays_dividends_of_both_cards() -> None:
    periods = books_of(STORY).dividend_periods()
    assert {period.end_ms - period.start_ms for period in periods if period.is_paid} == {WEEK_MS, 86_400_000}
    assert any(not period.is_paid for period in periods)


@settings(max_examples=200, deadline=None)
@given(st.permutations(STORY))
def test_the_order_of_entries_leaves_no_trace(entries: list[Entry]) -> None:
    assert outcome(books_of(entries)) == EXPECTED


MEMBER = st.sampled_from((b"a", b"b", b"c", b"d"))
# A few moments around the ends of periods of two lengths.
MOMENT = st.sampled_from([step * 30_000 for step in range(12)])
WORK = st.builds(
    PaidWork,
    opened_ms=MOMENT,
    period_s=st.sampled_from((60, 90)),
    head=MEMBER,
    payer=MEMBER,
    server=MEMBER,
    dividend_microcredits=st.integers(0, 1_000),
)
STEP = st.tuples(st.just("work"), WORK) | st.tuples(st.just("date"), st.tuples(MEMBER, MOMENT))


def apply(steps: list[tuple[str, object]], taken_back: list[PaidWork]) -> tuple[dict[bytes, int], Dividends]:
    dividends, paid = Dividends(), dict[bytes, int]()

    def add(changes: Changes) -> None:
        for member, change in changes.items():
            paid[member] = paid.get(member, 0) + change
        assert all(amount >= 0 for amount in paid.values())

    for work in taken_back:
        add(dividends.count(work, 1))
    for kind, what in steps:
        if kind == "work":
            assert isinstance(what, PaidWork)
            add(dividends.count(what, 1))
        else:
            assert isinstance(what, tuple)
            add(dividends.date(*what))
    for work in taken_back:
        add(dividends.count(work, -1))
    return {member: amount for member, amount in paid.items() if amount}, dividends


@settings(max_examples=400, deadline=None)
@given(st.lists(STEP, max_size=25), st.lists(WORK, max_size=4), st.data())
def test_any_order_and_anything_taken_back_end_as_if_counted_at_once(
    steps: list[tuple[str, object]], taken_back: list[PaidWork], data: st.DataObject
) -> None:
    paid, dividends = apply(steps, [])
    again, shuffled = apply(data.draw(st.permutations(steps)), taken_back)
    assert again == paid == counted_at_once(steps)
    assert shuffled.periods() == dividends.periods()


def counted_at_once(steps: list[tuple[str, object]]) -> dict[bytes, int]:
    """The rule as it is written, for one set of facts."""
    works = [what for _, what in steps if isinstance(what, PaidWork)]
    latest: dict[bytes, int] = {}
    for _, what in steps:
        if isinstance(what, tuple):
            latest[what[0]] = max(latest.get(what[0], -1), what[1])
    paid: dict[bytes, int] = {}
    for period_s, number in {(work.period_s, work.opened_ms // (1000 * work.period_s)) for work in works}:
        mine = [w for w in works if (w.period_s, w.opened_ms // (1000 * w.period_s)) == (period_s, number)]
        end_ms, heads = (number + 1) * 1000 * period_s, {work.head for work in mine}
        if 2 * sum(latest.get(head, -1) >= end_ms for head in heads) > len(heads):
            active = {work.payer for work in mine} | {work.server for work in mine}
            levy_share = sum(work.dividend_microcredits for work in mine)
            for member in active:
                paid[member] = paid.get(member, 0) + levy_share // len(active)
    return {member: amount for member, amount in paid.items() if amount}
