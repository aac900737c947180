"""Prices: the unit, the rounding, and cards that do not add up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger import canonical
from ledger.rate_card import (
    DEFAULT_RATE_CARD,
    MAX_NUMBER,
    MICROCREDITS_PER_CREDIT,
    RateCard,
    RateCardError,
    price,
)

COUNT = st.integers(0, 100_000)
GOLDEN = Path(__file__).parent / "golden"
PER_MILLE = st.integers(0, 1_000)
AMOUNT = st.integers(0, 2**53)
CARD = st.builds(
    RateCard,
    st.integers(1, 2**32 - 1),
    PER_MILLE,
    PER_MILLE,
    st.integers(0, 1_000_000),
    AMOUNT,
    AMOUNT,
    PER_MILLE,
    st.just(500) | PER_MILLE,
    st.just(7 * 86_400) | st.integers(60, 366 * 86_400),
    st.just(100) | st.integers(1, 1_000),
)


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
        {"dividend_per_mille": 1_001},
        {"dividend_period_s": 0},
        {"dividend_period_s": 400 * 86_400},
        {"floor_per_mille": 0},
        {"floor_per_mille": 1_001},
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


@given(CARD)
def test_any_card_survives_its_encoding(card: RateCard) -> None:
    assert RateCard.decode(card.encode()) == card


def test_a_card_has_one_encoding() -> None:
    """What format 1 can say is not said in format 2, or equal cards would have different bytes."""
    values = (1, 1_000, 100, 1_000, 10**9, 5 * 10**8, 20, 500, 7 * 86_400, 100)
    assert RateCard.decode(canonical.encode((1, *values[:7]))) == DEFAULT_RATE_CARD
    with pytest.raises(RateCardError):
        RateCard.decode(canonical.encode((2, *values)))


def golden_cards() -> dict[str, list[RateCard]]:
    other = replace(DEFAULT_RATE_CARD, levy_per_mille=100, starter_grant_microcredits=0)
    paying = replace(other, dividend_per_mille=1_000, dividend_period_s=86_400, floor_per_mille=50)
    return {
        "rate_cards_v1.hex": [DEFAULT_RATE_CARD, other, other.numbered(2)],
        "rate_cards_v2.hex": [paying, paying.numbered(3), replace(paying, cached_weight_per_mille=0)],
    }


@pytest.mark.parametrize("name", golden_cards())
def test_golden_rate_cards(name: str) -> None:
    """Never edit the files: rosters and journals name these versions."""
    golden = [bytes.fromhex(line) for line in (GOLDEN / name).read_text().split()]
    assert [card.encode() for card in golden_cards()[name]] == golden
    assert [RateCard.decode(raw) for raw in golden] == golden_cards()[name]


@given(card=CARD, number=st.integers(2, MAX_NUMBER), levy=PER_MILLE)
def test_a_published_version_depends_on_all_the_card_says(card: RateCard, number: int, levy: int) -> None:
    published = card.numbered(number)
    assert published.is_named_by_content
    assert published.number == number
    assert replace(card, version=7).numbered(number) == published
    changed = replace(published, levy_per_mille=levy)
    assert changed.is_named_by_content == (levy == card.levy_per_mille)


def test_a_version_as_people_read_it() -> None:
    assert (DEFAULT_RATE_CARD.name, DEFAULT_RATE_CARD.number) == ("1", 1)
    assert not DEFAULT_RATE_CARD.is_named_by_content
    assert DEFAULT_RATE_CARD.numbered(2).name.startswith("2-")
    for number in (0, 1, MAX_NUMBER + 1):
        with pytest.raises(RateCardError):
            DEFAULT_RATE_CARD.numbered(number)


def test_dividends_are_a_part_of_the_levy() -> None:
    assert DEFAULT_RATE_CARD.dividend(DEFAULT_RATE_CARD.levy(1_350_000)) == 13_500
    assert DEFAULT_RATE_CARD.dividend(1) == 0
