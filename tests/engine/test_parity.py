"""The pod's tokens are transformers' tokens: every family, whole and at every cut, alone and together."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from node.engine.scheduler import StepLimits
from node.links.frames import Sampling
from tests.engine.ring import Ring
from tests.engine.tiny import NUM_LAYERS, VOCAB_SIZE, TinyModel, configs

NUM_TOKENS = 24
CUTS = [(), *[(cut,) for cut in range(1, NUM_LAYERS)], (1, 3), (1, 2, 3)]
SAMPLING = Sampling(temperature=0, max_num_output_tokens=NUM_TOKENS, ignore_eos=True)


def make_prompts() -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (1, 5, 16, 33, 70)]


@pytest.fixture(scope="module", params=list(configs()))
def model(request: pytest.FixtureRequest, tiny: Callable[[str], TinyModel]) -> TinyModel:
    return tiny(request.param)


@pytest.fixture(scope="module")
def expected(model: TinyModel) -> list[list[int]]:
    return [model.generate(prompt, NUM_TOKENS) for prompt in make_prompts()]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_tokens_are_those_of_transformers(
    model: TinyModel, expected: list[list[int]], cuts: tuple[int, ...]
) -> None:
    # 16 tokens per step: the longer prompts are prefilled in chunks, between the decodes of the others.
    limits = StepLimits(max_num_prefill_tokens=16)
    with Ring(model.package, cuts, limits=limits) as ring:
        alone = [ring.generate([prompt], SAMPLING)[0] for prompt in make_prompts()]
        together = ring.generate(make_prompts(), SAMPLING)
    assert alone == expected
    assert together == expected
