"""The pod's tokens are transformers' tokens: every family, whole and at every cut, alone and together."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from node.engine.attention import PagedStep, Span
from node.engine.scheduler import StepLimits
from node.links.frames import Sampling
from tests.engine.ring import Ring, load
from tests.engine.tiny import NUM_LAYERS, VOCAB_SIZE, TinyModel, configs

NUM_TOKENS = 24
CUTS = [(), *[(cut,) for cut in range(1, NUM_LAYERS)], (1, 3), (1, 2, 3)]
SAMPLING = Sampling(temperature=0, max_num_output_tokens=NUM_TOKENS, ignore_eos=True)
LENGTHS = (1, 5, 16, 33, 70)
# From one block to beyond what is read in place; chunks that run in groups, and alone.
FAR_LENGTHS = (1, 2, 17, 40, 130, 200, 390)
CHUNKS = (7, 64)
KV_TOKENS = 4096


def make_prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]


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


@pytest.mark.parametrize("chunk", CHUNKS)
@torch.inference_mode()
def test_logits_of_far_lengths_in_one_batch(model: TinyModel, chunk: int) -> None:
    """Every step takes the next tokens of every session that has any, in one pass, and each row's logits
    are transformers' own over the whole prompt."""
    loaded = load(model.package, 0, NUM_LAYERS, KV_TOKENS)
    shard, prompts = loaded.shard, make_prompts(FAR_LENGTHS)
    tables = [loaded.cache.open(len(prompt)) for prompt in prompts]
    rows: list[list[torch.Tensor]] = [[] for _ in prompts]
    for start in range(0, max(FAR_LENGTHS), chunk):
        active = [index for index, prompt in enumerate(prompts) if start < len(prompt)]
        parts = [prompts[index][start : start + chunk] for index in active]
        spans = [Span(tables[index], start, len(part)) for index, part in zip(active, parts, strict=True)]
        positions = torch.tensor([start + step for part in parts for step in range(len(part))])
        hidden_TD = shard.embed(torch.tensor([token for part in parts for token in part]))
        hidden_TD = shard.run(hidden_TD, positions, PagedStep(loaded.cache, spans), 0, NUM_LAYERS)
        logits = shard.logits(hidden_TD).split([len(part) for part in parts])
        for index, part in zip(active, logits, strict=True):
            rows[index].append(part)
    for prompt, own in zip(prompts, rows, strict=True):
        expected = model.reference(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(torch.cat(own), expected, atol=2e-4, rtol=1e-3)
