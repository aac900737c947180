"""Every sampling parameter through real engines, whole and split: against transformers' logits and the slow
sampler, after a replay too. Also what engines refuse, and what a model that makes nonsense does to others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from node.engine.sampling_limits import sampling_problem
from node.links.frames import ErrorCode, OpenSession, Sampling
from tests.engine.ring import GREEDY, Heard, Ring, wait_until
from tests.engine.test_sampling_exact import slow_edits, slow_logprobs, slow_token
from tests.engine.tiny import VOCAB_SIZE, TinyModel

PROMPT = [5, 9, 17, 33, 65, 129, 60, 9]
NUM_TOKENS = 14
SAMPLED = Sampling(temperature=0.8, seed=12, max_num_output_tokens=NUM_TOKENS, ignore_eos=True)
PARAMETERS = {
    "temperature": SAMPLED,
    "top_k": replace(SAMPLED, top_k=7),
    "top_p": replace(SAMPLED, top_p=0.6),
    "min_p": replace(SAMPLED, min_p=0.2),
    "frequency_penalty": replace(SAMPLED, temperature=0, frequency_penalty=-9.0),
    "presence_penalty": replace(SAMPLED, temperature=0.3, presence_penalty=-9.0),
    "repetition_penalty": replace(SAMPLED, temperature=0.5, repetition_penalty=1.5),
    "logit_bias": replace(SAMPLED, logit_bias=((7, 6.0), (60, -100.0), (11, 5.5))),
    "logprobs": replace(SAMPLED, temperature=0, num_top_logprobs=4),
    "all": replace(
        SAMPLED,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        frequency_penalty=0.4,
        presence_penalty=-0.3,
        repetition_penalty=1.2,
        logit_bias=((7, 3.0),),
        num_top_logprobs=0,
    ),
}


@pytest.fixture(scope="module", params=[(), (1, 3)], ids=["whole", "split"])
def ring(request: pytest.FixtureRequest, llama: TinyModel) -> Iterator[Ring]:
    with Ring(llama.package, request.param) as ring:
        yield ring


def logits_after(llama: TinyModel, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return llama.reference(torch.tensor([ids])).logits[0, -1].float().numpy()


def slow_generate(llama: TinyModel, sampling: Sampling) -> list[int]:
    output_ids: list[int] = []
    for _ in range(sampling.max_num_output_tokens):
        row = slow_edits(logits_after(llama, PROMPT + output_ids), sampling, PROMPT, output_ids)
        output_ids.append(slow_token(row, sampling, len(PROMPT) + len(output_ids)))
    return output_ids


def run(ring: Ring, opening: OpenSession) -> Heard:
    heard = ring.open(opening)
    ring.start(opening)
    wait_until(lambda: heard.is_over)
    ring.close_session(opening)
    return heard


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_parameter_alone_and_again_after_a_replay(ring: Ring, llama: TinyModel, name: str) -> None:
    sampling = PARAMETERS[name]
    heard = run(ring, ring.opening(PROMPT, sampling))
    assert not heard.errors
    assert heard.tokens == slow_generate(llama, sampling)
    if name not in ("temperature", "logprobs", "logit_bias"):
        plain = replace(SAMPLED, temperature=sampling.temperature)
        assert heard.tokens != slow_generate(llama, plain), "a parameter that changes nothing tests nothing"
    for index, item in enumerate(heard.items):
        expected = dict(slow_logprobs(logits_after(llama, PROMPT + heard.tokens[:index]), VOCAB_SIZE))
        assert (item.logprob is not None) == (sampling.num_top_logprobs >= 0)
        assert len(item.top_logprobs) == max(0, sampling.num_top_logprobs)
        assert all(abs(logprob - expected[token_id]) < 1e-3 for token_id, logprob in item.top_logprobs)
        assert item.logprob is None or abs(item.logprob - expected[item.token_id]) < 1e-3
    num_before = 5
    again = replace(
        ring.opening(PROMPT + heard.tokens[:num_before], sampling), num_output_tokens_before=num_before
    )
    assert run(ring, again).tokens == heard.tokens[num_before:]


def test_all_settings_in_one_batch_are_as_each_alone(ring: Ring, llama: TinyModel) -> None:
    together = ring.generate([PROMPT] * len(PARAMETERS), *PARAMETERS.values())
    assert together == [slow_generate(llama, sampling) for sampling in PARAMETERS.values()]


def test_stop_ids_wait_for_the_minimum_under_sampling(ring: Ring) -> None:
    stops = tuple(range(0, VOCAB_SIZE, 2))
    sampling = replace(SAMPLED, ignore_eos=False, eos_token_ids=stops, min_num_output_tokens=6)
    tokens = ring.generate([PROMPT], sampling)[0]
    assert len(tokens) > 6
    assert all(token_id % 2 for token_id in tokens[:6])
    assert tokens[-1] % 2 == 0


BAD = {
    "temperature": -0.1,
    "top_p": 0.0,
    "min_p": 1.5,
    "frequency_penalty": float("nan"),
    "presence_penalty": float("inf"),
    "repetition_penalty": 0.0,
    "num_top_logprobs": 21,
}


@pytest.mark.parametrize(("name", "value"), BAD.items())
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    assert sampling_problem(replace(SAMPLED, **{name: value}), VOCAB_SIZE) == f"{name} is outside its range"
    assert sampling_problem(SAMPLED, VOCAB_SIZE) is None


@pytest.mark.parametrize(
    "biases",
    [((1, float("nan")),), ((1, 101.0),), ((1, 1.0), (1, 2.0)), tuple((n, 0.0) for n in range(1025))],
    ids=["nan", "high", "twice", "many"],
)
def test_biases_that_cannot_be_are_refused(biases: tuple[tuple[int, float], ...]) -> None:
    problem = sampling_problem(replace(SAMPLED, logit_bias=biases), 5000)
    assert problem == "logit_bias is outside its range"


def test_engines_refuse_what_would_index_beyond_the_vocabulary(llama: TinyModel) -> None:
    with Ring(llama.package, (2,)) as ring:
        for sampling in (
            replace(GREEDY, logit_bias=((VOCAB_SIZE, 1.0),)),
            replace(GREEDY, eos_token_ids=(VOCAB_SIZE,)),
            replace(GREEDY, logit_bias=((3, 1.0), (3, 2.0))),
            replace(GREEDY, temperature=101.0),
        ):
            errors = ring.open(ring.opening(PROMPT, sampling)).errors
            assert {error.code for error in errors} == {ErrorCode.BAD_FRAME}
        # A last stage that must know the prompt and is not told it, and ids that no table has.
        wanting = ring.opening(PROMPT, replace(GREEDY, repetition_penalty=1.1))
        heard = ring.heard.setdefault(wanting.session, Heard())
        last = ring.route[1].node
        ring.head.send(last, replace(wanting, stage_index=1, prompt_ids=()))
        wait_until(lambda: len(heard.errors) == 1)
        ring.head.send(last, replace(wanting, stage_index=1, prompt_ids=(VOCAB_SIZE,) * len(PROMPT)))
        wait_until(lambda: len(heard.errors) == 2)
        assert {error.code for error in heard.errors} == {ErrorCode.BAD_FRAME}
        assert ring.generate([PROMPT])[0]


def test_nan_ends_its_own_session_and_no_other(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model makes NaN of whatever begins with one token."""
    with Ring(llama.package, (2,)) as ring:
        shard = ring.shards[1].shard
        real = type(shard).logits

        def logits(self: object, hidden_BD: torch.Tensor) -> torch.Tensor:
            made = real(shard, hidden_BD)
            made[made.argmax(dim=-1) == victim] = float("nan")
            return made

        fine = ring.generate([PROMPT[:3]], SAMPLED)[0]
        victim = llama.generate(PROMPT, 1)[0]
        greedy_other = llama.generate(PROMPT[:3], 3)
        assert victim not in greedy_other
        monkeypatch.setattr(type(shard), "logits", logits)
        doomed = ring.opening(PROMPT, GREEDY)
        other = ring.opening(PROMPT[:3], replace(GREEDY, max_num_output_tokens=3))
        heards = [ring.open(opening) for opening in (doomed, other)]
        for opening in (doomed, other):
            ring.start(opening)
        wait_until(lambda: all(heard.is_over for heard in heards))
        assert [error.code for error in heards[0].errors] == [ErrorCode.INTERNAL]
        assert heards[0].errors[0].message == "the model produced NaN"
        assert heards[0].tokens == []
        assert heards[1].tokens == greedy_other
        monkeypatch.undo()
        ring.close_session(doomed)
        ring.close_session(other)
        wait_until(ring.all_kv_free)
        assert ring.generate([PROMPT[:3]], SAMPLED)[0] == fine
