"""Guesses with a real head: the same text, and books in which a guess that was wrong never stands."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from ledger.entry import HoldSettled
from node.engine.scheduler import StepLimits
from node.links.frames import HiddenBatch, Sampling
from node.sessions.receipts import SIGN_EVERY_NUM_TOKENS
from tests.engine.guessing import always_guess, guess_from
from tests.engine.ring import GREEDY, Ring, wait_until
from tests.engine.tiny import VOCAB_SIZE, TinyModel, make_tiny
from tests.node.ring_head import RingHead, read_and_settle

pytestmark = pytest.mark.anyio

TIMEOUT_S = 120


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


def make_prompts() -> list[list[int]]:
    """All begin alike, so that the prefix cache has something to find."""
    rng = random.Random(13)
    start = [rng.randrange(3, VOCAB_SIZE) for _ in range(36)]
    return [start + [rng.randrange(3, VOCAB_SIZE) for _ in range(5 * number)] for number in range(5)]


async def expected_texts(llama: TinyModel, sampling: Sampling) -> list[list[int]]:
    with Ring(llama.package, (1, 3)) as ring:
        return await asyncio.to_thread(ring.generate, make_prompts(), sampling)


@pytest.mark.parametrize("kv_tokens", [2048, 352])
@pytest.mark.parametrize(
    "sampling",
    [
        replace(GREEDY, max_num_output_tokens=150),
        Sampling(temperature=0.8, seed=3, max_num_output_tokens=150, ignore_eos=True, repetition_penalty=1.1),
    ],
    ids=["greedy", "seeded"],
)
async def test_every_book_agrees_to_the_token(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch, kv_tokens: int, sampling: Sampling
) -> None:
    """Guesses good and bad, prefix hits, chunks; with little KV preemptions too."""
    prompts, expected = make_prompts(), await expected_texts(llama, sampling)
    nums = guess_from(monkeypatch, [[*p, *tokens] for p, tokens in zip(prompts, expected, strict=True)])
    limits = StepLimits(max_num_prefill_tokens=20)
    with Ring(llama.package, (1, 3), kv_tokens=kv_tokens, limits=limits) as ring:
        head = RingHead(ring)
        async with asyncio.timeout(TIMEOUT_S):
            sessions = await asyncio.gather(*(head.open(prompt, sampling) for prompt in prompts))
            results = await asyncio.gather(*map(read_and_settle, sessions))
        assert [tokens for tokens, _ in results] == expected
        assert len(nums) > 30
        usages = [usage for _, usage in results]
        assert [usage.num_output_tokens for usage in usages] == [150] * 5
        assert [usage.num_prompt_tokens for usage in usages] == list(map(len, prompts))
        assert (sum(session.num_attempts for session in sessions) > 5) == (kv_tokens < 2048)
        head.check_books(usages)
        wait_until(ring.all_kv_free)
        settled = {e.session: e.num_output_tokens for e in head.entries() if isinstance(e, HoldSettled)}
        wait_until(lambda: sum(event.session in settled for event in ring.ended()) == 3 * len(settled))
        for event in ring.ended():
            # A stage may have been a row further when another gave up.
            num_more = event.num_output_tokens - settled.get(event.session, event.num_output_tokens)
            assert num_more == 0 or (num_more == 1 and kv_tokens < 2048)
        head.close()


async def test_what_is_left_unread_is_not_paid_for(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that stops in the middle of the tokens of one step, as for a stop string."""
    sampling = replace(GREEDY, max_num_output_tokens=150)
    prompts, expected = make_prompts(), await expected_texts(llama, sampling)
    guess_from(monkeypatch, [[*p, *tokens] for p, tokens in zip(prompts, expected, strict=True)])
    with Ring(llama.package, (1, 3)) as ring:
        head = RingHead(ring)
        usages = []
        async with asyncio.timeout(TIMEOUT_S):
            for num_read in (1, 5, SIGN_EVERY_NUM_TOKENS - 1, SIGN_EVERY_NUM_TOKENS + 9, 131):
                session = await head.open(prompts[0], sampling)
                tokens = []
                async for token in session.tokens():
                    tokens.append(token.token_id)
                    if len(tokens) == num_read:
                        break
                assert tokens == expected[0][:num_read]
                usage = await session.settle(num_read)
                assert num_read <= usage.num_output_tokens <= num_read + 15
                usages.append(usage)
        head.check_books(usages)
        wait_until(ring.all_kv_free)
        head.close()


async def test_a_prompt_that_is_repeated_takes_few_passes(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a head asks for by default; off when it is told so."""
    always_guess(monkeypatch)
    sampling = replace(GREEDY, max_num_output_tokens=90, logit_bias=((9, 100.0),))
    num_frames = {}
    for max_num_draft_tokens in (0, 15):
        with Ring(llama.package, (1, 3)) as ring:
            head = RingHead(ring)
            if not max_num_draft_tokens:
                head.head._opener._max_num_draft_tokens = 0
            tokens, usage = await head.generate(make_prompts()[0], sampling)
            assert tokens == [9] * 90
            assert usage.num_output_tokens == 90
            num_frames[max_num_draft_tokens] = ring.engines[1].links.counts().sent[HiddenBatch].num_frames
            head.close()
    assert num_frames[0] >= 90
    assert num_frames[15] <= 90 / 6
