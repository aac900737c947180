"""What stages answer, sorted by session, at a cost that no answer can choose."""

from __future__ import annotations

import asyncio
import time

from node.links.batches import MAX_NUM_ITEMS
from node.links.frames import FinishReason, TokenBatch, TokenItem
from node.links.subscriptions import Received, Subscriptions

NODE = bytes(32)


def session(number: int) -> bytes:
    return number.to_bytes(16, "big")


def items_of(number: int) -> tuple[TokenItem, ...]:
    return tuple(TokenItem(session(number), position, 1, FinishReason.NONE) for position in range(2))


def test_each_session_gets_its_own_items_and_nobody_those_of_a_stranger() -> None:
    async def run() -> None:
        subscriptions = Subscriptions()
        one, other = subscriptions.open(session(1)), subscriptions.open(session(2))
        first, second = zip(items_of(1), items_of(2), strict=True)
        subscriptions.received(NODE, TokenBatch((*first, *items_of(3), *second)))
        assert await one.next() == Received(NODE, TokenBatch(items_of(1)))
        assert await other.next() == Received(NODE, TokenBatch(items_of(2)))

    asyncio.run(run())


def test_a_batch_of_thousands_of_sessions_does_not_hold_the_loop_up() -> None:
    subscriptions = Subscriptions()
    items = tuple(TokenItem(session(n), 0, 1, FinishReason.NONE) for n in range(MAX_NUM_ITEMS))
    started_s = time.perf_counter()
    subscriptions.received(NODE, TokenBatch(items))
    assert time.perf_counter() - started_s < 0.2
