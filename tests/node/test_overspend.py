"""How far a member gets past its credit line in a busy pod: at one gateway, and at several that cannot see
each other. The bound is the one in docs/decisions.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from ledger.entry import HoldOpened, decode_entry
from ledger.ledger import Ledger
from ledger.rate_card import DEFAULT_RATE_CARD
from node.gateway.backend import QuotaExceeded
from node.sessions.session import HeadSession
from node.sessions.waiting_line import MAX_NUM_ASKING_OF_LINE
from node.standings import check_credit
from tests.ledger.world import KEY_SHOWN, raws
from tests.node.session_world import Pod

pytestmark = pytest.mark.anyio

NUM_TOKENS = 200
NUM_REQUESTS = 24
LINE = 3_000_000
CARD = replace(DEFAULT_RATE_CARD, credit_line_microcredits=LINE)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def gateway(number: int) -> Pod:
    def check(member: bytes) -> None:
        check_credit(pod.ledger, member, CARD, pod.world.clock())

    pod = Pod(number=number, check_credit=check)
    pod.first.num_tokens = pod.last.num_tokens = NUM_TOKENS
    # Whoever comes finds the pod busy.
    pod.last.num_refusals = NUM_REQUESTS
    return pod


async def ask_for_all(pod: Pod) -> list[HeadSession]:
    """As many requests of one member as come in; the others are refused."""
    request = pod.request(NUM_TOKENS)
    if pod.world.directory.members[pod.node] != request.payer:
        request = replace(request, authorize=lambda hold: KEY_SHOWN)
    found = await asyncio.gather(
        *(pod.head.open(request, CARD) for _ in range(NUM_REQUESTS)), return_exceptions=True
    )
    sessions = [one for one in found if isinstance(one, HeadSession)]
    refused = [one for one in found if isinstance(one, QuotaExceeded)]
    assert len(sessions) + len(refused) == NUM_REQUESTS
    assert sessions
    assert refused
    return sessions


async def deliver(sessions: list[HeadSession]) -> None:
    for session in sessions:
        num_read = 0
        async for _ in session.tokens():
            num_read += 1
            session.num_delivered = num_read
        await session.settle(num_read)


def largest_hold(ledger: Ledger) -> int:
    bodies = [decode_entry(raw).body for raw in raws(ledger)]
    return max(body.amount_microcredits for body in bodies if isinstance(body, HoldOpened))


async def spend_everywhere(gateways: list[Pod], after_each: Callable[[], None]) -> int:
    """The member's balance after it has used all gateways, and all of them have told each other."""
    for pod in gateways:
        await deliver(await ask_for_all(pod))
        after_each()
    everything = [raw for pod in gateways for raw in raws(pod.ledger)]
    for pod in gateways:
        assert not pod.ledger.ingest(everything).refused
        assert pod.ledger.open_holds() == []
        assert sum(pod.ledger.balances().values()) == 0
    balances = {pod.ledger.balance(pod.world.members[0]) for pod in gateways}
    assert len(balances) == 1
    return balances.pop()


async def test_at_one_gateway_holds_count_and_the_line_is_passed_by_the_last_ones_only() -> None:
    pod = gateway(0)
    sessions = await ask_for_all(pod)
    hold = largest_hold(pod.ledger)
    assert pod.ledger.available(pod.world.members[0]) >= -LINE - MAX_NUM_ASKING_OF_LINE * hold
    await deliver(sessions)
    assert -LINE - MAX_NUM_ASKING_OF_LINE * hold <= pod.ledger.balance(pod.world.members[0]) < 0
    pod.thread.close()


async def test_gateways_that_do_not_see_each_other_multiply_it_and_no_more() -> None:
    gateways = [gateway(number) for number in range(3)]
    balance = await spend_everywhere(gateways, lambda: None)
    one = LINE + MAX_NUM_ASKING_OF_LINE * largest_hold(gateways[0].ledger)
    # More than any of them alone would have given, so that the test would see a bound that is too low.
    assert -3 * one <= balance < -one
    for pod in gateways:
        pod.thread.close()


async def test_gateways_that_see_each_others_holds_share_one_line() -> None:
    gateways = [gateway(number) for number in range(3)]

    def sync() -> None:
        everything = [raw for pod in gateways for raw in raws(pod.ledger)]
        for pod in gateways:
            pod.ledger.ingest(everything)

    first, *others = gateways
    await deliver(await ask_for_all(first))
    sync()
    for pod in others:
        with pytest.raises(QuotaExceeded, match="past the credit line"):
            await pod.head.open(replace(pod.request(NUM_TOKENS), authorize=lambda hold: KEY_SHOWN), CARD)
    for pod in gateways:
        pod.thread.close()
