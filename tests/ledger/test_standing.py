"""A balance becomes a weight: never nothing, never falling as the balance rises."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger.rate_card import DEFAULT_RATE_CARD, MICROCREDITS_PER_CREDIT
from ledger.standing import is_past_credit_line, weight_per_mille

CARD = replace(DEFAULT_RATE_CARD, floor_per_mille=100)
balances = st.integers(-(2**53), 2**53)
amounts = st.integers(0, 2**53)


@pytest.mark.parametrize(
    ("credits", "weight"), [(-10_000, 100), (-500, 100), (1000, 550), (2500, 1000), (10_000, 1000)]
)
def test_the_starter_grant_is_the_middle(credits: int, weight: int) -> None:
    assert weight_per_mille(credits * MICROCREDITS_PER_CREDIT, CARD) == weight


@given(balance=balances, more=amounts, grant=amounts, line=amounts, floor=st.integers(1, 1000))
def test_a_weight_rises_with_the_balance_within_its_bounds(
    balance: int, more: int, grant: int, line: int, floor: int
) -> None:
    card = replace(
        CARD, starter_grant_microcredits=grant, credit_line_microcredits=line, floor_per_mille=floor
    )
    weight = weight_per_mille(balance, card)
    assert floor <= weight <= 1000
    assert weight <= weight_per_mille(balance + more, card)


def test_past_the_credit_line_is_below_it() -> None:
    line = CARD.credit_line_microcredits
    assert not is_past_credit_line(-line, CARD)
    assert is_past_credit_line(-line - 1, CARD)
