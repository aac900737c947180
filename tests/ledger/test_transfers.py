"""Transfers: nobody gives away more than it was given, on any replica, in whatever order entries come."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.books import Books
from ledger.entry import TREASURY, AccountOpened, Body, Entry, Issued, Transferred, sign_entry
from ledger.rate_card import DEFAULT_RATE_CARD
from ledger.rules import EntryRefused, check_entry
from tests.ledger.world import POD, START_MS, World, session_id

WORLD = World()
A, B, C = WORLD.members
GRANT = DEFAULT_RATE_CARD.starter_grant_microcredits
LINE = DEFAULT_RATE_CARD.credit_line_microcredits


def entries(*bodies: Body) -> list[Entry]:
    """Whoever may write them: the books do not check."""
    node = WORLD.nodes[0]
    return [
        sign_entry(POD, node.public, index, bytes(32), START_MS, body, node.sign)
        for index, body in enumerate(bodies)
    ]


def books_of(written: list[Entry]) -> Books:
    books = Books(WORLD.directory)
    for entry in written:
        books.apply(entry)
        assert sum(books.balances().values()) == 0
    return books


def test_grant_and_credit_line_can_be_given_away() -> None:
    books = books_of(entries(AccountOpened(A, 1), Transferred(A, B, GRANT + LINE)))
    assert (books.balance(A), books.balance(B)) == (-LINE, GRANT + LINE)
    assert books.transferable_microcredits(A) == 0


def test_beyond_that_each_transfer_gets_its_share() -> None:
    """The account of a changed node that writes more than there is, to two friends."""
    books = books_of(
        entries(AccountOpened(A, 1), Transferred(A, B, 3 * (GRANT + LINE)), Transferred(A, C, GRANT + LINE))
    )
    assert books.balance(A) == -LINE
    assert books.balance(B) == 3 * books.balance(C) == 3 * (GRANT + LINE) // 4


def test_an_account_that_was_given_nothing_gives_nothing() -> None:
    books = books_of(entries(Transferred(A, B, 10**9)))
    assert (books.balance(A), books.balance(B)) == (0, 0)


def test_nothing_goes_to_an_account_that_is_nobodys() -> None:
    """Else a changed node could make others keep as many accounts as it likes."""
    [entry] = entries(Transferred(A, b"nobody's account, of 32 bytes...", 5))
    with pytest.raises(EntryRefused, match="nobody of this pod"):
        check_entry(entry, POD, WORLD.directory, lambda *_: ())


def test_what_members_gave_is_not_given_on() -> None:
    """Else three accounts that pass one amount around would cover each other's transfers."""
    circle = [Transferred(A, B, 10**12), Transferred(B, C, 10**12), Transferred(C, A, 10**12)]
    books = books_of(entries(*circle, *circle))
    assert all(books.balance(member) == 0 for member in (A, B, C))


def test_what_the_treasury_gave_and_what_was_earned_is() -> None:
    receipt = WORLD.receipt(session_id(1), head=0, stage=1)
    earned = receipt.amount_microcredits - DEFAULT_RATE_CARD.levy(receipt.amount_microcredits)
    books = books_of(
        entries(
            Transferred(B, C, 10**12),
            Transferred(TREASURY, B, 5_000),
            WORLD.hold(session_id(1)),
            WORLD.settlement(session_id(1), receipt),
        )
    )
    assert (books.balance(B), books.balance(C)) == (0, earned + 5_000)


MEMBER = st.sampled_from((A, B, C))
ACCOUNT = MEMBER | st.just(TREASURY)
AMOUNT = st.integers(1, 3 * GRANT)
BODY: st.SearchStrategy[Body] = (
    st.builds(AccountOpened, MEMBER, st.just(1))
    | st.builds(Issued, AMOUNT)
    | st.tuples(ACCOUNT, ACCOUNT, AMOUNT)
    .filter(lambda move: move[0] != move[1])
    .map(lambda move: Transferred(*move))
)


@settings(max_examples=300, deadline=None)
@given(st.lists(BODY, max_size=12), st.data())
def test_in_any_order_the_same_and_nobody_below_what_covers_it(
    bodies: list[Body], data: st.DataObject
) -> None:
    written = entries(*bodies)
    books = books_of(written)
    assert books_of(data.draw(st.permutations(written))).balances() == books.balances()
    assert all(books.balance(member) >= -LINE for member in WORLD.members)
