"""transformers' tokens, when KV is short: chunked prefill, shared beginnings and preemption, all at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from node.engine.scheduler import StepLimits
from tests.engine.ring import GREEDY, Ring, wait_until
from tests.engine.tiny import VOCAB_SIZE, TinyModel
from tests.node.ring_head import RingHead

pytestmark = pytest.mark.anyio

NUM_TOKENS = 60


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def make_prompts() -> list[list[int]]:
    """Two beginnings, shared by half of the prompts each; some are short, one ends with its block."""
    rng = random.Random(21)
    beginnings = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (40, 64)]
    ends = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (1, 3, 9, 17, 24, 33, 50, 0)]
    return [beginnings[number % 2] + end for number, end in enumerate(ends)]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("cuts", [(), (1, 3)], ids=str)
async def test_tokens_are_those_of_transformers(
    tiny: Callable[[str], TinyModel], family: str, cuts: tuple[int, ...]
) -> None:
    model, prompts = tiny(family), make_prompts()
    expected = [model.generate(prompt, NUM_TOKENS) for prompt in prompts]
    sampling = replace(GREEDY, max_num_output_tokens=NUM_TOKENS)
    limits = StepLimits(max_num_prefill_tokens=12, min_num_prefill_tokens=4)
    # Two of the longest fit, and nothing else beside them.
    with Ring(model.package, cuts, kv_tokens=352, limits=limits) as ring:
        head = RingHead(ring)
        num_attempts: list[int] = []

        async def generate(prompt: list[int]) -> list[int]:
            session = await head.open(prompt, sampling)
            tokens = [token.token_id async for token in session.tokens()]
            usages.append(await session.settle(len(tokens)))
            num_attempts.append(session.num_attempts)
            return tokens

        for _ in range(2):
            usages = []
            async with asyncio.timeout(120):
                assert await asyncio.gather(*map(generate, prompts)) == expected
            num_cached_tokens = [usage.num_cached_tokens for usage in usages]
        assert max(num_attempts) > 1
        assert sum(num > 0 for num in num_cached_tokens) > 1
        assert head.ledger.open_holds() == []
        wait_until(ring.all_kv_free)
        head.close()
