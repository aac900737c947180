"""The sampler against a slow one that sorts everything and adds up with Python's integers, over random rows
and settings: equal to the last bit, alone and in any batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from node.engine.sampling import Draw, Pick, Sampler, uniform
from node.engine.sampling_edits import LogitEdits
from node.links.frames import Sampling

VOCAB_SIZES = (1, 2, 40, 64, 65, 700)


def slow_edits(
    row: np.ndarray, sampling: Sampling, prompt_ids: Sequence[int], output_ids: Sequence[int]
) -> np.ndarray:
    """Token by token, in float32 as the sampler has it."""
    row = row.copy()
    f32 = np.float32
    for token_id, bias in sampling.logit_bias:
        row[token_id] += f32(bias)
    if sampling.repetition_penalty != 1:
        penalty = f32(sampling.repetition_penalty)
        for token_id in {*prompt_ids, *output_ids}:
            row[token_id] = row[token_id] / penalty if row[token_id] > 0 else row[token_id] * penalty
    for token_id, count in Counter(output_ids).items():
        row[token_id] -= f32(count) * f32(sampling.frequency_penalty) + f32(sampling.presence_penalty)
    return row


def slow_token(row: np.ndarray, sampling: Sampling, position: int) -> int:
    """Sort the whole vocabulary, cut, and walk along it."""
    order = sorted(range(len(row)), key=lambda token_id: (-float(row[token_id]), token_id))
    if sampling.temperature == 0:
        return order[0]
    scale = np.float32(1 / sampling.temperature)
    relative = np.exp((row - row[order[0]]) * scale)
    weights = [math.floor(float(relative[token_id]) * 2**40) for token_id in order]
    if sampling.top_k:
        weights = weights[: sampling.top_k]
    weights = [weight for weight in weights if weight >= sampling.min_p * 2**40]
    if sampling.top_p < 1:
        needed, kept, sum_ = Fraction(sampling.top_p) * sum(weights), 0, 0
        while sum_ < needed:
            sum_ += weights[kept]
            kept += 1
        weights = weights[:kept]
    target = Fraction(uniform(sampling.seed, position)) * sum(weights)
    sum_ = 0
    for token_id, weight in zip(order, weights, strict=False):
        sum_ += weight
        if sum_ > target:
            return token_id
    raise AssertionError("the target lies inside the mass")


def slow_logprobs(row: np.ndarray, num_top: int) -> list[tuple[int, float]]:
    total = torch.logsumexp(torch.from_numpy(row).double(), 0).item()
    order = sorted(range(len(row)), key=lambda token_id: (-float(row[token_id]), token_id))
    return [(token_id, float(row[token_id]) - total) for token_id in order[:num_top]]


@st.composite
def rows(draw: st.DrawFn, vocab_size: int) -> np.ndarray:
    """Steep and flat, with equal logits on purpose, and some that may never be picked."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    row = generator.standard_normal(vocab_size) * draw(st.sampled_from([0.0, 0.1, 1.0, 3.0, 30.0]))
    if draw(st.booleans()):
        row = row.round()
    row[generator.random(vocab_size) < draw(st.sampled_from([0.0, 0.5]))] = -np.inf
    row[generator.integers(vocab_size)] = draw(st.sampled_from([0.0, -0.0, 5.0]))
    return row.astype(np.float32)


@st.composite
def samplings(draw: st.DrawFn, vocab_size: int) -> Sampling:
    ids = st.integers(0, vocab_size - 1)
    return Sampling(
        temperature=draw(st.sampled_from([0.0, 0.1, 0.8, 1.0, 2.0])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.5, 0.001, 1 - 1e-9])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 15, 50, 3000])),
        min_p=draw(st.sampled_from([0.0, 0.0, 1e-6, 0.05, 1.0])),
        seed=draw(st.integers(0, 2**64 - 1)),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.3, -2.0])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.5, -0.1])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.5])),
        logit_bias=tuple(
            draw(st.dictionaries(ids, st.sampled_from([-100.0, -1.5, 3.0, 100.0]), max_size=3)).items()
        ),
        num_top_logprobs=draw(st.sampled_from([-1, -1, 0, 3, 20])),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, list[Draw], list[tuple[list[int], list[int]]]]:
    """Rows, their draws, and each one's prompt and output ids, of which the last few may be guesses."""
    vocab_size = draw(st.sampled_from(VOCAB_SIZES))
    ids = st.lists(st.integers(0, vocab_size - 1), max_size=12)
    drawn, draws, histories = [], [], []
    for _ in range(draw(st.integers(1, 5))):
        sampling = draw(samplings(vocab_size))
        prompt_ids, before, since, extra = draw(ids), draw(ids), draw(ids), draw(ids)
        edits = None
        if LogitEdits.are_needed(sampling):
            edits = LogitEdits(sampling, prompt_ids + before, len(before))
            for token_id in since:
                edits.add(token_id)
        drawn.append(draw(rows(vocab_size)))
        draws.append(Draw(sampling, draw(st.integers(0, 2**32 - 1)), 3, edits, tuple(extra)))
        histories.append((prompt_ids, before + since + extra))
    return np.stack(drawn), draws, histories


@settings(max_examples=200, deadline=None)
@given(cases())
def test_every_pick_is_the_slow_sampler_s(
    case: tuple[np.ndarray, list[Draw], list[tuple[list[int], list[int]]]],
) -> None:
    logits, draws, histories = case
    picks = Sampler().sample(torch.from_numpy(logits), draws)
    for row, draw, (prompt_ids, output_ids), pick in zip(logits, draws, histories, picks, strict=True):
        assert pick is not None
        sampling = draw.sampling
        assert pick.token_id == slow_token(
            slow_edits(row, sampling, prompt_ids, output_ids), sampling, draw.position
        )
        if sampling.num_top_logprobs < 0:
            assert (pick.logprob, pick.top_logprobs) == (None, ())
            continue
        expected = dict(slow_logprobs(row, len(row)))
        assert pick.logprob is not None
        assert abs(pick.logprob - expected[pick.token_id]) < 1e-4 + 1e-6 * abs(pick.logprob)
        listed = [pair for pair in slow_logprobs(row, sampling.num_top_logprobs) if math.isfinite(pair[1])]
        assert [token_id for token_id, _ in pick.top_logprobs] == [token_id for token_id, _ in listed]
        assert all(abs(a - b) < 1e-4 for (_, a), (_, b) in zip(pick.top_logprobs, listed, strict=True))


@settings(max_examples=100, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_a_pick_depends_on_no_other_row(
    case: tuple[np.ndarray, list[Draw], list[tuple[list[int], list[int]]]], random: object
) -> None:
    logits, draws, _ = case
    rows_BV = torch.from_numpy(logits)
    sampler = Sampler()
    together = sampler.sample(rows_BV, draws)
    alone: list[Pick | None] = []
    for index, draw in enumerate(draws):
        alone += sampler.sample(rows_BV[index : index + 1], [draw])
    assert together == alone
    order = list(range(len(draws)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = sampler.sample(rows_BV[order], [draws[index] for index in order])
    assert shuffled == [together[index] for index in order]


def test_a_vocabulary_of_ordinary_size_is_exact_too() -> None:
    generator = np.random.default_rng(5)
    rows_BV = (generator.standard_normal((6, 49152)) * [[3], [3], [3], [1], [0.01], [8]]).astype(np.float32)
    rows_BV[:, :30] += 9
    settings_ = [
        Sampling(temperature=0.8, top_p=0.95),
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=40, top_p=0.9),
        Sampling(temperature=1.2, top_p=0.999),
        Sampling(temperature=2.0, top_k=20_000),
        Sampling(temperature=1.0, min_p=0.02),
    ]
    draws = [Draw(sampling, 77, 0) for sampling in settings_]
    picks = Sampler().sample(torch.from_numpy(rows_BV), draws)
    for row, draw, pick in zip(rows_BV, draws, picks, strict=True):
        assert pick is not None
        assert pick.token_id == slow_token(row, draw.sampling, draw.position)
