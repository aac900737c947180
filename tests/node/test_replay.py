"""Preemption and lost stages from the head's side: the same text, nothing twice, and books that are right."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from ledger.entry import HoldOpened, HoldSettled
from node.gateway.backend import GenerationFailed, NoRoute
from node.links.frames import Sampling, Stage
from tests.engine.ring import GREEDY, Ring, wait_until
from tests.engine.tiny import VOCAB_SIZE, TinyModel, make_tiny
from tests.node.ring_head import RingHead, read_and_settle

pytestmark = pytest.mark.anyio

TIMEOUT_S = 60


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


def make_prompts(num: int, length: int) -> list[list[int]]:
    rng = random.Random(11)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for _ in range(num)]


async def test_preempted_requests_give_the_same_text_and_are_paid_for_once(llama: TinyModel) -> None:
    prompts = make_prompts(6, 20)
    sampling = replace(GREEDY, max_num_output_tokens=80)
    expected = [llama.generate(prompt, 80) for prompt in prompts]
    # Room for about two and a half of them at their full length.
    with Ring(llama.package, (1, 3), kv_tokens=256) as ring:
        head = RingHead(ring)
        sessions = await asyncio.gather(*(head.open(prompt, sampling) for prompt in prompts))

        async with asyncio.timeout(TIMEOUT_S):
            results = await asyncio.gather(*map(read_and_settle, sessions))
        assert [tokens for tokens, _ in results] == expected
        usages = [usage for _, usage in results]
        assert sum(session.num_attempts for session in sessions) > len(sessions)
        assert [usage.num_prompt_tokens for usage in usages] == [20] * 6
        assert [usage.num_output_tokens for usage in usages] == [80] * 6
        head.check_books(usages)
        wait_until(ring.all_kv_free)
        # Who paid for everything has nothing held against it, however often it had to replay.
        accounts = [engine._endings.unpaid.num_unpaid(ring.head_key.public) for engine in ring.engines]
        assert max(accounts) <= 0
        head.close()


async def test_sampled_text_does_not_depend_on_preemption(llama: TinyModel) -> None:
    prompts = make_prompts(5, 10)
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=5, max_num_output_tokens=60, ignore_eos=True)
    with Ring(llama.package, (2,)) as ring:
        expected = [ring.generate([prompt], sampling)[0] for prompt in prompts]
    with Ring(llama.package, (2,), kv_tokens=160) as ring:
        head = RingHead(ring)
        async with asyncio.timeout(TIMEOUT_S):
            results = await asyncio.gather(*(head.generate(prompt, sampling) for prompt in prompts))
        assert [tokens for tokens, _ in results] == expected
        head.check_books([usage for _, usage in results])
        head.close()


async def test_a_lost_stage_is_replaced_and_the_text_goes_on(llama: TinyModel) -> None:
    sampling = replace(GREEDY, max_num_output_tokens=300)
    prompt = make_prompts(1, 20)[0]
    # Two engines hold the last layers; the second takes over.
    with Ring(llama.package, (1, 3), num_spares=1) as ring:
        spare = Stage(ring.spare_nodes[0], "memory:0", 3, 4)
        head = RingHead(ring, [ring.route, (*ring.route[:2], spare)])
        session = await head.open(prompt, sampling)
        tokens = []
        async with asyncio.timeout(TIMEOUT_S):
            async for token in session.tokens():
                tokens.append(token.token_id)
                if len(tokens) == 100:
                    await asyncio.to_thread(ring.engines[2].stop)
            usage = await session.settle(len(tokens))
        assert tokens == llama.generate(prompt, 300)
        assert session.num_attempts == 2
        assert (usage.num_prompt_tokens, usage.num_output_tokens) == (20, 300)
        first, second = [entry for entry in head.entries() if isinstance(entry, HoldSettled)]
        # The stages that live sign for all they did; the lost one is paid up to what it signed.
        counts = [signed.receipt.num_output_tokens for signed in first.receipts]
        assert counts == [first.num_output_tokens, first.num_output_tokens, 65]
        assert first.num_output_tokens >= 100
        assert {signed.receipt.num_prompt_tokens for signed in second.receipts} == {0}
        assert [signed.receipt.num_output_tokens for signed in second.receipts] == [
            300 - first.num_output_tokens
        ] * 3
        assert head.ledger.open_holds() == []
        head.close()


async def test_with_nobody_to_take_over_the_request_fails_and_costs_what_it_gave(llama: TinyModel) -> None:
    with Ring(llama.package, (2,)) as ring:
        head = RingHead(ring)
        session = await head.open(make_prompts(1, 20)[0], replace(GREEDY, max_num_output_tokens=300))
        num_tokens = 0

        async def read() -> None:
            nonlocal num_tokens
            async for _ in session.tokens():
                num_tokens += 1
                if num_tokens == 100:
                    await asyncio.to_thread(ring.engines[1].stop)

        async with asyncio.timeout(TIMEOUT_S):
            with pytest.raises(GenerationFailed, match=r"the stage \["):
                await read()
            usage = await session.settle(num_tokens)
        assert (usage.num_prompt_tokens, usage.num_output_tokens) == (20, num_tokens)
        assert [type(entry) for entry in head.entries()] == [HoldOpened, HoldSettled]
        # The stage that lives signs for all of it; the one that is gone has signed for some.
        settled = head.entries()[1]
        assert isinstance(settled, HoldSettled)
        counts = [signed.receipt.num_output_tokens for signed in settled.receipts]
        assert counts[0] == num_tokens
        assert counts[1] in (1, 65)
        assert head.ledger.open_holds() == []
        head.close()


async def test_cancelled_in_the_pause_nothing_stays_open(llama: TinyModel) -> None:
    with Ring(llama.package, (2,)) as ring:
        head = RingHead(ring)
        session = await head.open(make_prompts(1, 20)[0], replace(GREEDY, max_num_output_tokens=300))
        seen: list[int] = []
        pausing = asyncio.Event()
        find_route = head._find_route

        def find_later(model: bytes, avoided: frozenset[bytes]) -> tuple[Stage, ...]:
            if session.num_attempts > 1:
                pausing.set()
            return find_route(model, avoided)

        head.head._opener._find_route = find_later

        async def read() -> None:
            async for token in session.tokens():
                seen.append(token.token_id)
                if len(seen) == 30:
                    await asyncio.to_thread(ring.engines[1].stop)

        reading = asyncio.create_task(read())
        async with asyncio.timeout(TIMEOUT_S):
            await pausing.wait()
            reading.cancel()
            await asyncio.wait([reading])
            usage = await session.settle(len(seen))
        assert usage.num_output_tokens == len(seen)
        assert head.ledger.open_holds() == []
        assert head.head.num_sessions == 0
        assert head.links.subscriptions._by_session == {}
        wait_until(ring.all_kv_free)
        head.close()


async def test_the_second_request_with_the_same_beginning_pays_less(llama: TinyModel) -> None:
    system, first, second = make_prompts(3, 48)
    prompts = [system + first[:10], system + second[:10]]
    with Ring(llama.package, (1, 3)) as ring:
        head = RingHead(ring)
        results = [await head.generate(prompt, GREEDY) for prompt in [*prompts, prompts[0]]]
        assert [tokens for tokens, _ in results] == [llama.generate(p, 16) for p in [*prompts, prompts[0]]]
        usages = [usage for _, usage in results]
        assert [usage.num_cached_tokens for usage in usages] == [0, 48, 48]
        assert {usage.num_prompt_tokens for usage in usages} == {58}
        head.check_books(usages)
        paid = [
            sum(signed.receipt.amount_microcredits for signed in entry.receipts)
            for entry in head.entries()
            if isinstance(entry, HoldSettled)
        ]
        assert paid[1] < paid[0]
        wait_until(ring.all_kv_free)
        head.close()


async def test_a_request_that_never_fits_is_refused_at_once(llama: TinyModel) -> None:
    with Ring(llama.package, (2,), kv_tokens=64) as ring:
        head = RingHead(ring)
        async with asyncio.timeout(5):
            with pytest.raises(
                NoRoute, match="100 tokens of KV room may be needed, this stage has 64 in all"
            ):
                await head.open(make_prompts(1, 20)[0], replace(GREEDY, max_num_output_tokens=80))
        assert head.entries() == []
        head.close()
