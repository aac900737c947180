"""Prices: the unit, the rounding, and cards that do not add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger import canonical
from ledger.rate_card import DEFAULT_RATE_CARD, MICROCREDITS_PER_CREDIT, RateCard, RateCardError, price

COUNT = st.integers(0, 100_000)


def test_one_token_through_a_billion_parameters_is_one_credit() -> None:
    assert price(DEFAULT_RATE_CARD, 10**9, 0, 0, 1) == MICROCREDITS_PER_CREDIT
    assert price(DEFAULT_RATE_CARD, 10**9, 1, 0, 0) == MICROCREDITS_PER_CREDIT


def test_cached_tokens_are_part_of_the_prompt_and_cheaper() -> None:
    assert price(DEFAULT_RATE_CARD, 10**9, 10, 4, 0) == 6_400_000


def test_the_price_is_rounded_down() -> None:
    assert price(DEFAULT_RATE_CARD, 1_999, 1, 0, 0) == 1
    assert price(DEFAULT_RATE_CARD, 999, 1, 0, 0) == 0


@given(parameters=st.integers(0, 10**11), prompt=COUNT, output=COUNT, more=COUNT)
def test_more_work_never_costs_less(parameters: int, prompt: int, output: int, more: int) -> None:
    before = price(DEFAULT_RATE_CARD, parameters, prompt, 0, output)
    assert price(DEFAULT_RATE_CARD, parameters, prompt, 0, output + more) >= before
    assert type(before) is int


@pytest.mark.parametrize("counts", [(-1, 0, 0, 0), (1, -1, 0, 0), (1, 1, 2, 0), (1, 1, 0, -1)])
def test_impossible_counts_have_no_price(counts: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"never negative|more cached"):
        price(DEFAULT_RATE_CARD, *counts)


@pytest.mark.parametrize(
    "change",
    [
        {"levy_per_mille": 1_001},
        {"levy_per_mille": -1},
        {"version": 0},
        {"output_weight_per_mille": -1},
        {"starter_grant_microcredits": 2**60},
    ],
)
def test_a_card_that_does_not_add_up_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(RateCardError):
        replace(DEFAULT_RATE_CARD, **change)


def test_a_card_survives_its_encoding_and_nothing_else_does() -> None:
    raw = DEFAULT_RATE_CARD.encode()
    assert RateCard.decode(raw) == DEFAULT_RATE_CARD
    levy_of_two = canonical.encode((1, 1, 1, 1, 1, 1, 1, 2_000))
    for damaged in (raw + b"\x00", raw[:-1], b"", b"\xa0", b"x" * 500, levy_of_two):
        with pytest.raises(RateCardError):
            RateCard.decode(damaged)
