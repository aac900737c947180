"""Picking tokens: against the definition, and against the distribution it should draw from."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from node.engine.sampling import Draw, Sampler, finish_reason, greedy_on_device, uniform
from node.links.frames import FinishReason, Sampling

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])
NUM_DRAWS = 4000


def ids_of(logits_BV: torch.Tensor, draws: list[Draw]) -> list[int]:
    picks = Sampler().sample(logits_BV, draws)
    assert None not in picks
    return [pick.token_id for pick in picks if pick is not None]


def draws_of(sampling: Sampling, logits_V: torch.Tensor = LOGITS, num_draws: int = 400) -> Counter[int]:
    draws = [Draw(sampling, position, 5) for position in range(num_draws)]
    return Counter(ids_of(logits_V.repeat(num_draws, 1), draws))


def test_the_random_number_is_pinned() -> None:
    """Another hash would break replays between versions."""
    assert [
        round(uniform(seed, position), 6) for seed, position in ((0, 0), (0, 1), (1, 0), (2**64 + 1, 0))
    ] == [
        0.687963,
        0.43698,
        0.373621,
        0.373621,
    ]


def test_random_numbers_are_uniform() -> None:
    values = torch.tensor([uniform(11, position) for position in range(NUM_DRAWS)])
    assert 0 <= float(values.min()) <= float(values.max()) < 1
    assert abs(float(values.mean()) - 0.5) < 0.02
    assert abs(float(values.var()) - 1 / 12) < 0.005


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 4])
def test_tokens_follow_the_softmax(temperature: float, top_k: int) -> None:
    logits = LOGITS.clone()
    if top_k:
        logits[3] = float("-inf")
    expected = torch.softmax(logits / temperature, -1)
    counts = draws_of(Sampling(temperature=temperature, top_k=top_k, seed=4), logits, NUM_DRAWS)
    for token_id, probability in enumerate(expected.tolist()):
        assert abs(counts[token_id] / NUM_DRAWS - probability) < 0.03


def test_top_k_top_p_and_min_p_cut_the_tail() -> None:
    assert set(draws_of(Sampling(top_k=2))) == {1, 4}
    assert set(draws_of(Sampling(top_k=1))) == {1}
    assert set(draws_of(Sampling(top_k=5))) == set(range(5))
    # Probabilities in order: 0.45, 0.27, 0.16, 0.06, 0.02.
    assert set(draws_of(Sampling(top_p=0.4))) == {1}
    assert set(draws_of(Sampling(top_p=0.7))) == {1, 4}
    assert set(draws_of(Sampling(top_p=0.75))) == {1, 4, 2}
    assert set(draws_of(Sampling(top_p=1e-9))) == {1}
    # Relative to the likeliest: 1, 0.61, 0.37, 0.14, 0.05.
    assert set(draws_of(Sampling(min_p=0.6))) == {1, 4}
    assert set(draws_of(Sampling(min_p=0.62))) == {1}
    assert set(draws_of(Sampling(min_p=1.0))) == {1}
    assert set(draws_of(Sampling(min_p=0.3, top_k=2))) == {1, 4}
    # Of what min-p leaves (0.51, 0.31, 0.19), the first two reach 0.75.
    assert set(draws_of(Sampling(min_p=0.3, top_p=0.75))) == {1, 4}


def test_equal_logits_are_told_apart_by_their_ids() -> None:
    logits = torch.zeros(3, 200)
    logits[:, [7, 150, 199]] = 1.0
    greedy = Sampling(temperature=0)
    assert ids_of(logits, [Draw(greedy, n, 0) for n in range(3)]) == [7, 7, 7]
    assert [pick.token_id for pick in greedy_on_device(logits) if pick] == [7, 7, 7]
    assert set(ids_of(logits, [Draw(Sampling(top_k=1, seed=n), n, 0) for n in range(3)])) == {7}
    many = [Draw(Sampling(top_k=2), n, 0) for n in range(99)]
    assert set(ids_of(logits[:1].repeat(99, 1), many)) == {7, 150}


def test_no_eos_before_the_minimum() -> None:
    sampling = Sampling(temperature=0, eos_token_ids=(1, 4), min_num_output_tokens=2)
    assert ids_of(LOGITS[None], [Draw(sampling, 9, 1)]) == [2]
    assert ids_of(LOGITS[None], [Draw(sampling, 9, 2)]) == [1]
    assert 1 not in draws_of(replace(sampling, temperature=1.0, min_num_output_tokens=6))


def test_a_tiny_temperature_is_greedy() -> None:
    for temperature in (1e-300, 1e-9, 1e-4):
        assert set(draws_of(Sampling(temperature=temperature))) == {1}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0), Sampling(), Sampling(top_k=2, num_top_logprobs=2)]
)
def test_a_row_of_nonsense_spoils_no_other(sampling: Sampling, bad: float) -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 3] = bad
    draws = [Draw(sampling, position, 0) for position in range(3)]
    picks = Sampler().sample(logits, draws)
    assert picks[1] is None
    alone = Sampler().sample(LOGITS.repeat(2, 1), [draws[0], draws[2]])
    assert [picks[0], picks[2]] == alone
    if sampling.temperature == 0:
        assert [pick is None for pick in greedy_on_device(logits)] == [False, True, False]


def test_nothing_to_pick_from_is_no_token() -> None:
    nothing = torch.full((1, 5), float("-inf"))
    assert Sampler().sample(nothing, [Draw(Sampling(), 1, 0)]) == [None]
    all_eos = Sampling(eos_token_ids=(0, 1, 2, 3, 4), min_num_output_tokens=9)
    assert Sampler().sample(LOGITS[None], [Draw(all_eos, 1, 0)]) == [None]


def test_rows_stay_as_they_are_whatever_their_dtype() -> None:
    sampling = Sampling(temperature=0, eos_token_ids=(1,), min_num_output_tokens=2, num_top_logprobs=1)
    for dtype in (torch.float32, torch.bfloat16):
        logits = LOGITS[None].to(dtype)
        assert ids_of(logits, [Draw(sampling, 3, 0)]) == [4]
        assert torch.equal(logits, LOGITS[None].to(dtype))


def test_why_it_ends() -> None:
    sampling = Sampling(eos_token_ids=(1,), max_num_output_tokens=3)
    assert finish_reason(1, Draw(sampling, 9, 0)) is FinishReason.STOP
    assert finish_reason(2, Draw(sampling, 9, 0)) is FinishReason.NONE
    assert finish_reason(2, Draw(sampling, 9, 2)) is FinishReason.LENGTH
    assert finish_reason(1, Draw(replace(sampling, ignore_eos=True), 9, 0)) is FinishReason.NONE
