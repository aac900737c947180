"""Many requests over a ring of three: all finish or are cancelled, nothing stays behind; few frames."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from dataclasses import replace

import psutil
import pytest

from node.engine.scheduler import StepLimits
from node.gateway.backend import Usage
from node.links.frames import Frame, HiddenBatch, StageTiming, TokenBatch
from tests.engine.ring import GREEDY, Ring, wait_until
from tests.engine.tiny import VOCAB_SIZE, TinyModel
from tests.node.ring_head import RingHead

pytestmark = pytest.mark.anyio

NUM_REQUESTS = 200
MAX_NUM_AT_A_TIME = 24


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def one_request(head: RingHead, rng: random.Random) -> tuple[int, int, Usage, int]:
    """Asked for, taken, told: cancelled at a random token (or never), read slowly (or not)."""
    beginning = [rng.randrange(3, 6)] * rng.randrange(40)
    prompt = beginning + [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, 80))]
    num_asked = rng.randrange(1, 60)
    num_wanted = num_asked if rng.random() < 0.6 else rng.randrange(num_asked + 1)
    session = await head.open(prompt, replace(GREEDY, max_num_output_tokens=num_asked))
    num_tokens = 0
    tokens = session.tokens()
    while num_tokens < num_wanted:
        await anext(tokens)
        num_tokens += 1
        if rng.random() < 0.05:
            await asyncio.sleep(0)
    await tokens.aclose()
    usage = await session.settle(num_tokens)
    return num_wanted, num_tokens, usage, session.num_attempts


async def run_all(head: RingHead, num_requests: int, seed: int) -> list[tuple[int, int, Usage, int]]:
    at_a_time = asyncio.Semaphore(MAX_NUM_AT_A_TIME)

    async def run(number: int) -> tuple[int, int, Usage, int]:
        async with at_a_time:
            return await one_request(head, random.Random(seed + number))

    return await asyncio.gather(*map(run, range(num_requests)))


def num_objects() -> Counter[str]:
    """Of the node's own types, by name."""
    gc.collect()
    return Counter(
        type(one).__name__ for one in gc.get_objects() if str(type(one).__module__).startswith("node.")
    )


async def test_requests_of_all_sizes_come_and_go(llama: TinyModel) -> None:
    limits = StepLimits(max_num_prefill_tokens=48)
    # About ten of them fit at a time: some wait for room, some are preempted.
    with Ring(llama.package, (1, 3), kv_tokens=1024, limits=limits) as ring:
        head = RingHead(ring)
        async with asyncio.timeout(300):
            await run_all(head, NUM_REQUESTS // 4, 1)
            before, before_bytes = num_objects(), psutil.Process().memory_info().rss
            results = await run_all(head, NUM_REQUESTS, 1000)
        await head.head.close(10)
        wait_until(ring.all_kv_free)
        wait_until(lambda: not any(engine._book.sessions for engine in ring.engines))
        assert psutil.Process().memory_info().rss - before_bytes < 64 << 20
        # The test itself keeps what it was told; a few may be alive in frames that are on their way.
        ring.events.clear()
        grown = num_objects() - before
        del grown[Usage.__name__]
        assert all(num < 20 for num in grown.values()), grown
        assert any(num_attempts > 1 for *_, num_attempts in results)
        assert all(num_tokens == num_wanted for num_wanted, num_tokens, _, _ in results)
        assert all(usage.num_output_tokens == num_tokens for _, num_tokens, usage, _ in results)
        assert head.ledger.open_holds() == []
        assert head.head.num_sessions == 0
        assert head.links.subscriptions._by_session == {}
        for engine in ring.engines:
            book = engine._book
            assert not book.ready
            assert not book.num_of_head
            assert all(group.num_sessions == group.num_decoding == 0 for group in book.groups.values())
        head.close()


def sent(ring: Ring, kind: type[Frame]) -> tuple[list[int], list[int]]:
    """Frames and bytes, per stage."""
    counts = [engine.links.counts().sent.get(kind) for engine in ring.engines]
    return [count.num_frames if count else 0 for count in counts], [
        count.num_bytes if count else 0 for count in counts
    ]


@pytest.mark.parametrize("num_streams", [1, 16])
async def test_frames_and_bytes_per_token(llama: TinyModel, num_streams: int) -> None:
    """Per step one frame to each next hop with all its sessions; the token twice; nothing else, ever."""
    num_tokens, prompt = 40, [5, 9, 17]
    row_bytes = 4 * 48
    with Ring(llama.package, (1, 3)) as ring:
        ring.generate([prompt] * num_streams, replace(GREEDY, max_num_output_tokens=num_tokens))
        wait_until(lambda: all(sum(sent(ring, kind)[0]) for kind in (StageTiming, TokenBatch)))
        hidden_frames, hidden_bytes = sent(ring, HiddenBatch)
        token_frames, token_bytes = sent(ring, TokenBatch)
        num_rows = num_streams * (len(prompt) + num_tokens - 1)
        num_passes = num_streams * num_tokens
        assert hidden_frames[2] == token_frames[0] == token_frames[1] == 0
        # A row per token and hop, with at most 48 bytes of header for its session and 32 for the frame.
        for stage in (0, 1):
            assert hidden_bytes[stage] <= num_rows * row_bytes + num_passes * 48 + hidden_frames[stage] * 32
        # Each token goes to the head and, but for the last, to the first stage.
        assert token_bytes[2] <= num_streams * (2 * num_tokens - 1) * 64 + token_frames[2] * 32
        if num_streams == 1:
            assert hidden_frames[:2] == [num_tokens, num_tokens]
            assert token_frames[2] == 2 * num_tokens - 1
        else:
            # At best one frame per micro-batch of a third: 3 per token of all. Alone it would be 16.
            assert max(hidden_frames) <= 8 * num_tokens
            assert token_frames[2] <= 2 * 8 * num_tokens
