"""The head: what it holds, what it signs, and that whatever happens the ledger is left with no open hold."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ledger.entry import HoldOpened, HoldSettled, HoldVoided, decode_entry
from ledger.ledger import LedgerError
from ledger.rate_card import DEFAULT_RATE_CARD
from ledger.receipt import SignedReceipt
from ledger.session_record import SessionState
from node.gateway.backend import GenerationFailed, NoRoute
from node.links.frames import ErrorCode, FinishReason, SessionError, SignReceipt
from node.sessions import attempt as attempt_module
from node.sessions.authorization import Authorize
from node.sessions.receipts import SessionReceipts
from node.sessions.session import HeadSession
from tests.ledger.world import KEY_SHOWN, raws, session_id
from tests.node.session_world import PROMPT, Pod

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def pod() -> Iterator[Pod]:
    made = Pod()
    yield made
    made.thread.close()


def bodies(pod: Pod) -> list[object]:
    return [decode_entry(raw).body for raw in raws(pod.ledger)]


async def read(session: HeadSession) -> list[int]:
    return [token.token_id async for token in session.tokens()]


async def test_a_session_is_held_at_its_price_and_settled_as_delivered(pod: Pod) -> None:
    session = await pod.head.open(pod.request(), DEFAULT_RATE_CARD)
    (hold,) = pod.ledger.open_holds()
    assert await read(session) == [40, 41, 42, 43]
    usage = await session.settle(4)
    summary = pod.ledger.session(hold.author, hold.session)
    assert summary is not None
    assert summary.state is SessionState.SETTLED
    assert (usage.num_prompt_tokens, usage.num_output_tokens) == (3, 4)
    assert (summary.num_prompt_tokens, summary.num_output_tokens) == (3, 4)
    assert [stage.num_output_tokens for stage in summary.stages] == [4, 4]
    # The hold is the whole price and a microcredit for the rounding of each layer's stage.
    assert 0 < summary.amount_microcredits <= hold.amount_microcredits <= summary.amount_microcredits + 3
    assert [opening.hold_microcredits for opening in pod.links.openings] == [hold.amount_microcredits] * 2
    assert pod.ledger.open_holds() == []


async def test_a_stage_that_gives_up_voids_the_session(pod: Pod) -> None:
    node = pod.route[0].node
    pod.links.on_start = lambda session: pod.links.subscriptions.received(
        node, SessionError(session, 0, ErrorCode.INTERNAL, "broken")
    )
    session = await pod.head.open(pod.request(), DEFAULT_RATE_CARD)
    with pytest.raises(GenerationFailed, match="broken"):
        await read(session)
    usage = await session.settle(0)
    assert usage.num_output_tokens == 0
    assert [type(body) for body in bodies(pod)] == [HoldOpened, HoldVoided]


async def test_a_stranger_cannot_fail_a_session(pod: Pod) -> None:
    def start(session: bytes) -> None:
        stranger = SessionError(session, 0, ErrorCode.INTERNAL, "not of this route")
        pod.links.subscriptions.received(pod.world.nodes[0].public, stranger)
        pod.links.make_tokens(session)

    pod.links.on_start = start
    session = await pod.head.open(pod.request(), DEFAULT_RATE_CARD)
    assert len(await read(session)) == 4


async def test_no_room_is_tried_again_as_another_session(pod: Pod) -> None:
    pod.last.num_refusals = 2
    session = await pod.head.open(pod.request(), DEFAULT_RATE_CARD)
    attempts = {opening.session for opening in pod.links.openings}
    assert len(attempts) == 3
    # What a stage still says of the first attempt reaches nobody.
    late = SessionError(pod.links.openings[0].session, 0, ErrorCode.INTERNAL, "late")
    pod.links.subscriptions.received(pod.route[0].node, late)
    assert len(await read(session)) == 4
    await session.settle(4)
    assert [type(body) for body in bodies(pod)] == [HoldOpened, HoldSettled]


async def test_a_refusal_for_good_leaves_nothing_in_the_ledger(pod: Pod) -> None:
    pod.links.stages[pod.route[1].node].num_refusals = 1
    refuse = pod.links.subscriptions.received

    def say_bad_frame(node: bytes, frame: object) -> None:
        if isinstance(frame, SessionError):
            frame = replace(frame, code=ErrorCode.BAD_FRAME)
        refuse(node, frame)  # type: ignore[arg-type]

    pod.links.subscriptions.received = say_bad_frame  # type: ignore[method-assign]
    with pytest.raises(NoRoute, match="no room"):
        await pod.head.open(pod.request(), DEFAULT_RATE_CARD)
    assert bodies(pod) == []
    assert pod.links.subscriptions._by_session == {}


@pytest.mark.parametrize("num_steps", range(12))
async def test_cancelled_at_any_step_of_the_opening_no_hold_stays_open(pod: Pod, num_steps: int) -> None:
    opening = asyncio.create_task(pod.head.open(pod.request(), DEFAULT_RATE_CARD))
    for _ in range(num_steps):
        await asyncio.sleep(0)
    opening.cancel()
    try:
        session = await opening
    except asyncio.CancelledError:
        await pod.head.close(5)
        assert pod.ledger.open_holds() == []
        assert pod.links.subscriptions._by_session == {}
    else:
        await session.settle(0)
        assert pod.ledger.open_holds() == []


async def test_a_last_stage_that_skips_a_token_fails_the_session(pod: Pod) -> None:
    node = pod.route[1].node
    pod.links.on_start = lambda session: pod.links.say_token(node, session, 1, FinishReason.NONE)
    session = await pod.head.open(pod.request(), DEFAULT_RATE_CARD)
    with pytest.raises(GenerationFailed, match="position"):
        await read(session)
    await session.settle(0)
    assert pod.ledger.open_holds() == []


async def test_tokens_of_a_stage_that_is_not_the_last_are_not_taken(pod: Pod) -> None:
    def start(session: bytes) -> None:
        pod.links.say_token(pod.route[0].node, session, 0, FinishReason.STOP)
        pod.links.make_tokens(session)

    pod.links.on_start = start
    session = await pod.head.open(pod.request(), DEFAULT_RATE_CARD)
    assert await read(session) == [40, 41, 42, 43]


async def test_a_stage_that_does_not_stop_is_stopped_at_the_limit(pod: Pod) -> None:
    pod.last.num_tokens, pod.last.finish = 70, FinishReason.NONE
    session = await pod.head.open(pod.request(max_num_output_tokens=66), DEFAULT_RATE_CARD)
    tokens = [token async for token in session.tokens()]
    assert len(tokens) == 66
    assert [token.finish_reason for token in tokens[-2:]] == [FinishReason.NONE, FinishReason.LENGTH]
    usage = await session.settle(70)
    assert usage.num_output_tokens == 66
    (settled,) = [body for body in bodies(pod) if isinstance(body, HoldSettled)]
    assert [signed.receipt.num_output_tokens for signed in settled.receipts] == [66, 66]


async def test_more_tokens_in_the_batch_of_the_last_one_fail_the_session(pod: Pod) -> None:
    def start(session: bytes) -> None:
        subscription = pod.links.subscriptions
        batches: list[object] = []
        plain, subscription.received = subscription.received, lambda node, frame: batches.append(frame)  # type: ignore[method-assign]
        pod.links.make_tokens(session)
        subscription.received = plain  # type: ignore[method-assign]
        items = tuple(item for batch in batches for item in batch.items)  # type: ignore[attr-defined]
        plain(pod.route[1].node, replace(batches[0], items=items))  # type: ignore[type-var]

    pod.links.on_start = start
    session = await pod.head.open(pod.request(max_num_output_tokens=3), DEFAULT_RATE_CARD)
    with pytest.raises(GenerationFailed, match="after the last"):
        await read(session)
    await session.settle(0)
    assert [type(body) for body in bodies(pod)] == [HoldOpened, HoldVoided]


def signed_counts(pod: Pod) -> list[int]:
    """Output tokens of each receipt that the last stage was sent."""
    frames = [frame for frame in pod.last.said if isinstance(frame, SignReceipt)]
    return [SignedReceipt.decode(frame.receipt).receipt.num_output_tokens for frame in frames]


async def test_receipts_follow_what_the_client_was_given(pod: Pod) -> None:
    """The first token, then every 64th, and the end: no other frames, however many tokens there are."""
    pod.last.num_tokens = 300
    session = await pod.head.open(pod.request(max_num_output_tokens=300), DEFAULT_RATE_CARD)
    num_read = 0
    async for _ in session.tokens():
        num_read += 1
        session.num_delivered = num_read
    assert signed_counts(pod) == [1, 65, 129, 193, 257]
    await session.settle(300)
    assert signed_counts(pod) == [1, 65, 129, 193, 257, 300]
    (settled,) = [body for body in bodies(pod) if isinstance(body, HoldSettled)]
    assert [signed.receipt.num_output_tokens for signed in settled.receipts] == [300, 300]


@pytest.mark.parametrize("num_delivered", [1, 2, 64, 65, 66, 100])
async def test_a_client_that_goes_pays_for_what_it_was_given(pod: Pod, num_delivered: int) -> None:
    pod.last.num_tokens = 300
    session = await pod.head.open(pod.request(max_num_output_tokens=300), DEFAULT_RATE_CARD)
    num_read = 0
    async for _ in session.tokens():
        num_read += 1
        if num_read == num_delivered + 1:
            break
        session.num_delivered = num_read
    usage = await session.settle(num_delivered)
    assert usage.num_output_tokens == num_delivered
    (settled,) = [body for body in bodies(pod) if isinstance(body, HoldSettled)]
    assert settled.num_output_tokens == num_delivered
    assert [signed.receipt.num_output_tokens for signed in settled.receipts] == [num_delivered] * 2
    assert pod.ledger.open_holds() == []


async def test_a_client_that_goes_before_the_first_token_pays_nothing(pod: Pod) -> None:
    session = await pod.head.open(pod.request(), DEFAULT_RATE_CARD)
    async for _ in session.tokens():
        break
    assert (await session.settle(0)).num_output_tokens == 0
    assert signed_counts(pod) == []
    assert [type(body) for body in bodies(pod)] == [HoldOpened, HoldVoided]


async def test_text_that_is_held_back_for_long_is_signed_for_all_the_same(pod: Pod) -> None:
    """Or a stage would wait for the head, and the head for the stage. What is signed for is settled."""
    pod.last.num_tokens = 66
    session = await pod.head.open(pod.request(max_num_output_tokens=66), DEFAULT_RATE_CARD)
    assert len(await read(session)) == 66
    assert signed_counts(pod) == [1]
    usage = await session.settle(0)
    assert usage.num_output_tokens == 1
    (settled,) = [body for body in bodies(pod) if isinstance(body, HoldSettled)]
    assert settled.num_output_tokens == 1


async def test_a_request_that_fails_after_some_tokens_is_settled_at_those(pod: Pod) -> None:
    def start(session: bytes) -> None:
        for number in range(10):
            pod.links.say_token(pod.route[1].node, session, number, FinishReason.NONE)
        broken = SessionError(session, 1, ErrorCode.INTERNAL, "broken")
        pod.links.subscriptions.received(pod.route[1].node, broken)

    pod.links.on_start = start
    session = await pod.head.open(pod.request(max_num_output_tokens=20), DEFAULT_RATE_CARD)

    async def deliver() -> None:
        async for _ in session.tokens():
            session.num_delivered += 1

    with pytest.raises(GenerationFailed, match="broken"):
        await deliver()
    pod.last.co_signs = False
    usage = await session.settle(10)
    assert (usage.num_prompt_tokens, usage.num_output_tokens) == (3, 10)
    (settled,) = [body for body in bodies(pod) if isinstance(body, HoldSettled)]
    # The stage that broke is paid for what it had signed before.
    assert [signed.receipt.num_output_tokens for signed in settled.receipts] == [10, 1]
    assert pod.ledger.open_holds() == []


async def test_an_attempt_lost_in_its_prompt_costs_nothing_and_the_next_one_all(pod: Pod) -> None:
    num_starts = 0

    def start(session: bytes) -> None:
        nonlocal num_starts
        num_starts += 1
        if num_starts > 1:
            pod.links.make_tokens(session)
            return
        lost = SessionError(session, 0, ErrorCode.NEXT_HOP_UNREACHABLE, "the next stage is gone")
        pod.links.subscriptions.received(pod.route[0].node, lost)

    pod.links.on_start = start
    session = await pod.head.open(pod.request(), DEFAULT_RATE_CARD)
    assert await read(session) == [40, 41, 42, 43]
    usage = await session.settle(4)
    assert (session.num_attempts, usage.num_prompt_tokens, usage.num_output_tokens) == (2, 3, 4)
    settled = [body for body in bodies(pod) if isinstance(body, HoldSettled)]
    assert [(body.num_prompt_tokens, body.num_output_tokens) for body in settled] == [(3, 4)]
    assert Counter(map(type, bodies(pod))) == {HoldOpened: 2, HoldVoided: 1, HoldSettled: 1}
    assert pod.ledger.open_holds() == []


async def test_a_settlement_that_breaks_a_rule_leaves_no_hold_open(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await pod.head.open(pod.request(), DEFAULT_RATE_CARD)
    await read(session)
    wrong = pod.world.co_signed(pod.world.receipt(session_id(99)))
    monkeypatch.setattr(SessionReceipts, "co_signed", lambda self: (wrong,))
    with pytest.raises(LedgerError, match="another session"):
        await session.settle(4)
    assert [type(body) for body in bodies(pod)] == [HoldOpened, HoldVoided]


async def test_a_stage_that_gave_up_is_not_waited_for(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_module, "CO_SIGN_TIMEOUT_S", 3600.0)
    pod.first.co_signs = False
    session = await pod.head.open(pod.request(), DEFAULT_RATE_CARD)
    await read(session)
    disputed = SessionError(session.terms.session, 0, ErrorCode.DISPUTED_RECEIPT, "not my count")
    pod.links.subscriptions.received(pod.route[0].node, disputed)
    async with asyncio.timeout(5):
        usage = await session.settle(4)
    assert usage.num_output_tokens == 4
    (settled,) = [body for body in bodies(pod) if isinstance(body, HoldSettled)]
    assert [signed.receipt.stage for signed in settled.receipts] == [pod.route[1].node]


async def test_another_members_key_authorizes_the_hold_of_each_attempt(pod: Pod) -> None:
    asked: list[HoldOpened] = []

    def authorize(hold: HoldOpened) -> bytes:
        asked.append(hold)
        return KEY_SHOWN

    allowed: Authorize = authorize
    request = replace(pod.request(), payer=pod.world.members[1], authorize=allowed)
    session = await pod.head.open(request, DEFAULT_RATE_CARD)
    (hold,) = [body for body in bodies(pod) if isinstance(body, HoldOpened)]
    assert hold == replace(asked[0], authorization=KEY_SHOWN)
    assert (hold.payer, hold.session) == (pod.world.members[1], session.terms.session)
    assert len(PROMPT) == len(session.terms.prompt_ids)
