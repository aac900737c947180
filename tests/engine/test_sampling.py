"""Picking tokens: against the definition, and against the distribution it should draw from."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from node.engine.sampling import Draw, finish_reason, sample, uniform
from node.links.frames import FinishReason, Sampling

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])
NUM_DRAWS = 4000


def draws_of(sampling: Sampling) -> Counter[int]:
    draws = [Draw(sampling, position, 5) for position in range(NUM_DRAWS)]
    return Counter(sample(LOGITS.repeat(NUM_DRAWS, 1), draws))


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
def test_tokens_follow_the_softmax(temperature: float) -> None:
    expected = torch.softmax(LOGITS / temperature, -1)
    counts = draws_of(Sampling(temperature=temperature, seed=4))
    for token_id, probability in enumerate(expected.tolist()):
        assert abs(counts[token_id] / NUM_DRAWS - probability) < 0.03


def test_top_k_and_top_p_cut_the_tail() -> None:
    assert set(draws_of(Sampling(top_k=2))) == {1, 4}
    assert set(draws_of(Sampling(top_k=1))) == {1}
    # Probabilities in order: 0.45, 0.27, 0.16, 0.06, 0.02.
    assert set(draws_of(Sampling(top_p=0.4))) == {1}
    assert set(draws_of(Sampling(top_p=0.7))) == {1, 4}
    assert set(draws_of(Sampling(top_p=0.75))) == {1, 4, 2}
    assert set(draws_of(Sampling(top_p=1e-9))) == {1}


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    sampling = Sampling(temperature=0)
    mixed = [Draw(sampling, 1, 5), Draw(Sampling(seed=3), 7, 5), Draw(sampling, 2, 5)]
    together = sample(LOGITS.repeat(3, 1), mixed)
    assert together == [sample(LOGITS[None].clone(), [draw])[0] for draw in mixed]
    assert together[0] == together[2] == 1


def test_no_eos_before_the_minimum() -> None:
    sampling = Sampling(temperature=0, eos_token_ids=(1, 4), min_num_output_tokens=2)
    assert sample(LOGITS[None].clone(), [Draw(sampling, 9, 1)]) == [2]
    assert sample(LOGITS[None].clone(), [Draw(sampling, 9, 2)]) == [1]


def test_why_it_ends() -> None:
    sampling = Sampling(eos_token_ids=(1,), max_num_output_tokens=3)
    assert finish_reason(1, Draw(sampling, 9, 0)) is FinishReason.STOP
    assert finish_reason(2, Draw(sampling, 9, 0)) is FinishReason.NONE
    assert finish_reason(2, Draw(sampling, 9, 2)) is FinishReason.LENGTH
    assert finish_reason(1, Draw(replace(sampling, ignore_eos=True), 9, 0)) is FinishReason.NONE
