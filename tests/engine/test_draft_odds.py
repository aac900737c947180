"""When a guess pays: more the likelier it is, less the dearer a row is; misses make it pause."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.engine.draft_odds import MARGIN, MAX_PAUSE_TOKENS, DraftOdds, num_that_pay
from node.engine.pace import Pace

RATES = st.floats(0, 1)
PRICES = st.floats(0, 3)


@given(RATES, PRICES, st.integers(0, 15))
def test_the_last_guess_pays_and_one_more_would_not(rate: float, price: float, max_num: int) -> None:
    num = num_that_pay(rate, price, max_num)
    assert 0 <= num <= max_num
    if num:
        assert rate**num > 0.999 * price * MARGIN
    if num < max_num:
        assert rate ** (num + 1) <= 1.001 * price * MARGIN


@given(RATES, st.lists(st.tuples(st.integers(1, 15), st.integers(0, 15)), max_size=80))
def test_a_rate_stays_a_rate_and_pauses_have_an_end(rate: float, trials: list[tuple[int, int]]) -> None:
    odds = DraftOdds(rate, 1)
    for at, (num_proposed, num_accepted) in enumerate(trials):
        odds.learn(at, num_proposed, min(num_proposed, num_accepted))
        assert 0 <= odds.rate <= 1
        assert odds.resume_at <= at + MAX_PAUSE_TOKENS


def test_text_that_never_repeats_costs_next_to_nothing() -> None:
    """Something is found at every token, and it is always wrong."""
    odds = DraftOdds(0.7, 1)
    num_wasted = 0
    for at in range(1000):
        num = odds.num_to_try(at, 0.3, 15)
        if num:
            num_wasted += num
            odds.learn(at, num, 0)
    assert 0 < 0.3 * num_wasted < 0.01 * 1000


def test_rows_as_dear_as_passes_are_never_bought() -> None:
    odds = DraftOdds(1.0, 1)
    assert all(odds.num_to_try(at, 1.0, 15) == 0 for at in range(300))


def test_it_comes_back_when_the_text_begins_to_repeat() -> None:
    odds = DraftOdds(0.3, 4)
    for at in range(500):
        if num := odds.num_to_try(at, 0.2, 15):
            odds.learn(at, num, 0)
    at, end = 500, 500 + MAX_PAUSE_TOKENS + 4 * 16 + 40
    num_steps = 0
    while at < end:
        num = odds.num_to_try(at, 0.2, 15)
        if num:
            odds.learn(at, num, num)
        at, num_steps = at + 1 + num, num_steps + 1
    assert odds.num_to_try(at, 0.2, 15) > 5


def test_slow_links_make_longer_guesses_pay() -> None:
    assert num_that_pay(0.8, 0.3, 15) < num_that_pay(0.8, 0.05, 15)


def test_what_a_row_costs_is_learned_from_steps_with_guesses_alone() -> None:
    pace = Pace(0.010, 0.001, {1: 0.010, 4: 0.013, 16: 0.020})
    assert 0.0009 < pace.row_s < 0.0011
    for _ in range(40):
        pace.learn(1, 0, 0.026, num_drafts=8)
    assert 0.0018 < pace.row_s < 0.0021
    assert pace.decode_s(1) == 0.010
    for _ in range(40):
        pace.learn(1, 0, 0.005, num_drafts=8)
    assert 0.0004 < pace.row_s < 0.0006
