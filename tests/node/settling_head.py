"""Run by the kill test: a head that opens, reads, cuts, fails and settles sessions until it is killed, and
says what it told its clients.
"""

from __future__ import annotations

import asyncio
import random
from multiprocessing.connection import Connection

from ledger.rate_card import DEFAULT_RATE_CARD
from node.gateway.backend import GenerationFailed
from node.links.frames import ErrorCode, SessionError
from tests.node.session_world import Pod

NUM_AT_ONCE = 6
MAX_NUM_TOKENS = 90


def settle_until_killed(url: str, seed: int, reports: Connection) -> None:
    asyncio.run(_settle(url, random.Random(seed), reports))


async def _settle(url: str, rng: random.Random, reports: Connection) -> None:
    pod = Pod(url)
    await pod.head.recover()

    def start(session: bytes) -> None:
        pod.links.make_tokens(session)
        if rng.random() < 0.2:
            broken = SessionError(session, 1, ErrorCode.INTERNAL, "broken")
            pod.links.subscriptions.received(pod.route[1].node, broken)

    pod.links.on_start = start
    async with asyncio.TaskGroup() as group:
        for _ in range(NUM_AT_ONCE):
            group.create_task(_settle_sessions(pod, rng, reports))


async def _settle_sessions(pod: Pod, rng: random.Random, reports: Connection) -> None:
    while True:
        # The fake stage stops one short of the limit when it is to break.
        pod.last.num_tokens = rng.randrange(1, MAX_NUM_TOKENS)
        session = await pod.head.open(pod.request(MAX_NUM_TOKENS), DEFAULT_RATE_CARD)
        num_wanted = rng.randrange(MAX_NUM_TOKENS)
        num_read = 0
        try:
            async for _ in session.tokens():
                if num_read == num_wanted:
                    break
                num_read += 1
                session.num_delivered = num_read
        except GenerationFailed:
            pass
        usage = await session.settle(num_read)
        reports.send((session.terms.session, usage.num_output_tokens))
