"""Requests that find no room: the line at the gateway, who is refused and what they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ledger.rate_card import DEFAULT_RATE_CARD, MICROCREDITS_PER_CREDIT
from node.gateway.backend import QuotaExceeded, WaitedTooLong
from node.links.frames import OpenSession
from node.sessions import opener
from node.sessions.opener import Opening
from node.sessions.waiting_line import (
    MAX_NUM_ASKING,
    MAX_NUM_ASKING_OF_LINE,
    MAX_NUM_WAITING_OF_MEMBER,
    LineFull,
    WaitingLine,
)
from node.standings import quota_text
from node.token_counter import TokenCounter
from tests.node.session_world import Pod

pytestmark = pytest.mark.anyio

MODEL = b"m"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def pod() -> Iterator[Pod]:
    made = Pod()
    yield made
    made.thread.close()


class Line:
    """A waiting line, and who asks in it."""

    def __init__(self, own_member: bytes | None = None) -> None:
        self.counter = TokenCounter(lambda _: 1000)
        self.line = WaitingLine(self.counter, lambda: own_member)
        self.asking: list[bytes] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def add(self, member: bytes, model: bytes = MODEL) -> asyncio.Task[None]:
        async def wait() -> None:
            async with self.line.turn(member, model):
                self.asking.append(member)
                try:
                    await asyncio.Event().wait()
                finally:
                    self.asking.remove(member)

        task = asyncio.create_task(wait())
        self.tasks.append(task)
        await self.settle()
        return task

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def end(self, *tasks: asyncio.Task[None]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.settle()


async def test_a_member_asks_for_a_few_of_its_requests_at_once_in_order() -> None:
    line = Line()
    tasks = [await line.add(b"a") for _ in range(MAX_NUM_ASKING_OF_LINE + 2)]
    assert line.asking == [b"a"] * MAX_NUM_ASKING_OF_LINE
    await line.add(b"a", b"another model")
    assert len(line.asking) == MAX_NUM_ASKING_OF_LINE + 1
    # One that waits gives up: nothing moves. One that asks comes in: the next asks.
    await line.end(tasks[-1])
    assert len(line.asking) == MAX_NUM_ASKING_OF_LINE + 1
    await line.end(tasks[0])
    assert len(line.asking) == MAX_NUM_ASKING_OF_LINE + 1
    assert line.line.num_waiting == MAX_NUM_ASKING_OF_LINE + 1
    await line.end(*line.tasks)
    assert line.line.num_waiting == 0
    assert not line.line.is_behind(b"a", MODEL)
    assert line.line._asking.total() == 0


async def test_with_many_members_the_lowest_counters_ask_and_the_owner_always() -> None:
    members = [bytes([number]) for number in range(2 * MAX_NUM_ASKING)]
    line = Line(own_member=members[-1])
    first = [await line.add(b"first") for _ in range(MAX_NUM_ASKING_OF_LINE)]
    filling = [await line.add(b"filling%d" % number) for number in range(MAX_NUM_ASKING - len(first))]
    for number, member in enumerate(members):
        line.counter.charge(member, 1 + number)
        await line.add(member)
    assert not set(members) & set(line.asking)
    await line.end(filling[0])
    assert set(members) & set(line.asking) == {members[-1]}
    await line.end(filling[1], filling[2])
    assert set(members) & set(line.asking) == {members[-1], members[0], members[1]}
    await line.end(*line.tasks)
    assert line.asking == []


async def test_a_member_cannot_fill_the_line() -> None:
    line = Line()
    for _ in range(MAX_NUM_WAITING_OF_MEMBER):
        await line.add(b"a")
    with pytest.raises(LineFull, match="of this member wait"):
        async with line.line.turn(b"a", MODEL):
            pass
    task = await line.add(b"b")
    assert not task.done()
    await line.end(*line.tasks)


async def test_past_the_credit_line_one_is_refused_only_when_there_is_no_room(pod: Pod) -> None:
    checked: list[bytes] = []

    def check(member: bytes) -> None:
        checked.append(member)
        raise QuotaExceeded("past the line")

    pod.head._opener._check_credit = check
    session = await pod.head.open(pod.request(), DEFAULT_RATE_CARD)
    await session.settle(0)
    assert checked == []
    pod.first.num_refusals = 1
    with pytest.raises(QuotaExceeded):
        await pod.head.open(pod.request(), DEFAULT_RATE_CARD)
    assert checked == [pod.world.members[0]]
    assert pod.head.num_sessions == 0
    assert pod.ledger.open_holds() == []


async def test_who_waits_too_long_is_told_when_to_try_again(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opener, "RETRY_DELAY_S", (0.0, 0.001))
    pod.first.num_refusals = 10**9
    opening = Opening(pod.request(), DEFAULT_RATE_CARD, 2**52, wait_for_room_s=0.05)
    with pytest.raises(WaitedTooLong) as refused:
        await pod.head._opener.open(opening)
    assert refused.value.retry_after_s == opener.RETRY_AFTER_S
    assert pod.head._line.num_waiting == 0


async def test_without_room_lately_the_first_stage_is_asked_alone(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opener, "RETRY_DELAY_S", (0.0, 0.001))
    pod.first.num_refusals = 3
    session = await pod.head.open(pod.request(), DEFAULT_RATE_CARD)
    await session.settle(0)
    # Of four tries over two stages only the first, when nobody knew, and the last asked the second one.
    assert sum(isinstance(frame, OpenSession) for frame in pod.first.said) == 4
    assert sum(isinstance(frame, OpenSession) for frame in pod.last.said) == 2


def test_what_somebody_past_the_credit_line_is_told() -> None:
    card = replace(DEFAULT_RATE_CARD, dividend_period_s=86_400, dividend_per_mille=500)
    text = quota_text(-512_300_000, 0, card, 1_764_000_000_000)
    line = card.credit_line_microcredits // MICROCREDITS_PER_CREDIT
    for part in ("-512.30 credits", f"-{line}.00", "refills by 12.30", "dividend of 2025-11-25 00:00 UTC"):
        assert part in text, text
    assert "dividend" not in quota_text(-512_300_000, 0, replace(card, dividend_per_mille=0), 1)
