"""Penalties and logprobs with a real head: the same after preemptions, and checked against what was asked."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from node.engine.sampling import Pick, Sampler
from node.gateway.backend import GeneratedToken, GenerationFailed
from node.links.frames import Sampling
from node.sessions.session import HeadSession
from tests.engine.ring import Ring
from tests.engine.tiny import VOCAB_SIZE, TinyModel, make_tiny
from tests.node.ring_head import RingHead

pytestmark = pytest.mark.anyio

TIMEOUT_S = 60
PROMPTS = [[3 + (7 * row + 5 * column) % 190 for column in range(12)] for row in range(5)]
SAMPLING = Sampling(
    temperature=0.7,
    seed=5,
    max_num_output_tokens=70,
    ignore_eos=True,
    frequency_penalty=0.5,
    presence_penalty=0.5,
    repetition_penalty=1.3,
    logit_bias=((9, 2.0),),
    num_top_logprobs=2,
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


async def read(session: HeadSession) -> list[GeneratedToken]:
    tokens = [token async for token in session.tokens()]
    await session.settle(len(tokens))
    return tokens


async def generate(llama: TinyModel, kv_tokens: int) -> tuple[list[list[GeneratedToken]], int]:
    """All prompts at once, and how many attempts that took."""
    with Ring(llama.package, (1, 3), kv_tokens=kv_tokens) as ring:
        head = RingHead(ring)
        async with asyncio.timeout(TIMEOUT_S):
            sessions = [await head.open(prompt, SAMPLING) for prompt in PROMPTS]
            tokens = await asyncio.gather(*map(read, sessions))
        head.close()
        return tokens, sum(session.num_attempts for session in sessions)


async def test_penalties_go_on_counting_over_preemptions(llama: TinyModel) -> None:
    roomy, num_attempts = await generate(llama, kv_tokens=2048)
    assert num_attempts == len(PROMPTS)
    tight, num_attempts = await generate(llama, kv_tokens=208)
    assert num_attempts > len(PROMPTS)
    assert [[token.token_id for token in tokens] for tokens in tight] == [
        [token.token_id for token in tokens] for tokens in roomy
    ]
    for once, again in zip(roomy, tight, strict=True):
        for token, other in zip(once, again, strict=True):
            assert token.logprob is not None
            assert token.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert len(token.top_logprobs) == len(other.top_logprobs) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"logprob": None},
        {"top_logprobs": ((1, -1.0), (2, -2.0), (3, -3.0))},
        {"top_logprobs": ((VOCAB_SIZE, -1.0),)},
    ],
    ids=["none", "more than asked", "no token"],
)
async def test_a_stage_that_answers_with_other_logprobs_is_not_believed(
    llama: TinyModel, wrong: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Sampler.sample

    def sample(*arguments: object) -> list[Pick]:
        return [replace(pick, **wrong) for pick in real(*arguments)]  # type: ignore[arg-type,type-var]

    monkeypatch.setattr(Sampler, "sample", sample)
    with Ring(llama.package, (2,)) as ring:
        head = RingHead(ring)
        session = await head.open(PROMPTS[0], SAMPLING)
        async with asyncio.timeout(TIMEOUT_S):
            with pytest.raises(GenerationFailed, match="logprobs"):
                await read(session)
            await session.settle(0)
        head.close()
