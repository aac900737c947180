"""A generation whose key is revoked: it ends at once, what was given is settled, others go on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing

import pytest

from ledger.rate_card import DEFAULT_RATE_CARD
from ledger.session_record import SessionState
from node.gateway.backend import Caller, KeyRefused
from node.generation import Generation
from node.key_gate import KeyGate
from node.links.frames import FinishReason
from tests.node.session_world import Pod

pytestmark = pytest.mark.anyio
REVOKED = KeyRefused("the API key was revoked")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def pod() -> Iterator[Pod]:
    made = Pod()
    yield made
    made.thread.close()


class Story:
    """One generation over a head's session; the last stage says its tokens when the test does."""

    def __init__(self, pod: Pod) -> None:
        self.pod = pod
        self.ended: list[Generation] = []
        self.caller = Caller(pod.world.members[0], "ada", bytes(16), max_num_tokens_per_minute=100)
        self.gate = KeyGate(pod.ledger, pod.world.clock)
        self._num_said = 0

    async def begin(self, max_num_output_tokens: int = 10) -> Generation:
        self.pod.links.on_start = lambda session: None
        request = self.pod.request(max_num_output_tokens)
        admission = self.gate.admit(self.caller, 3 + max_num_output_tokens, 1)
        session = await self.pod.head.open(request, DEFAULT_RATE_CARD)
        admission.held()
        self._session = session.terms.session
        return Generation(self.caller, session, "route", admission, self.ended.append)

    def say(self, finish: FinishReason = FinishReason.NONE) -> None:
        self.pod.links.say_token(self.pod.route[-1].node, self._session, self._num_said, finish)
        self._num_said += 1


async def test_who_waits_for_a_token_is_told_at_once_and_pays_for_what_came(pod: Pod) -> None:
    story = Story(pod)
    generation = await story.begin()
    story.say()
    async with aclosing(generation.tokens()) as tokens:
        assert (await anext(tokens)).token_id == 40
        generation.delivered(1)
        waiting = asyncio.ensure_future(anext(tokens))
        await asyncio.sleep(0)
        generation.refuse(REVOKED)
        with pytest.raises(KeyRefused, match="revoked"):
            await waiting
        assert not waiting.cancelled()
    usage = await generation.settle(1)
    assert (usage.num_prompt_tokens, usage.num_output_tokens) == (3, 1)
    assert pod.ledger.open_holds() == []
    assert pod.ledger.recent_sessions(1)[0].state is SessionState.SETTLED
    assert story.ended == [generation]
    assert story.gate.rate_limits(story.caller)[0].remaining == 100 - 4


async def test_who_is_writing_is_told_before_the_next_token(pod: Pod) -> None:
    story = Story(pod)
    generation = await story.begin()
    story.say()
    story.say()
    async with aclosing(generation.tokens()) as tokens:
        await anext(tokens)
        generation.refuse(REVOKED)
        generation.refuse(KeyRefused("another reason"))
        with pytest.raises(KeyRefused, match="revoked"):
            await anext(tokens)
    await generation.settle(1)


async def test_a_client_that_leaves_is_no_refusal(pod: Pod) -> None:
    """Its own cancellation is heard even when the key is revoked in the same moment."""
    for is_revoked in (False, True):
        story = Story(pod)
        generation = await story.begin()

        async def read(generation: Generation = generation) -> None:
            async for _ in generation.tokens():
                pass

        reading = asyncio.ensure_future(read())
        await asyncio.sleep(0.01)
        if is_revoked:
            generation.refuse(REVOKED)
        reading.cancel()
        await asyncio.wait({reading})
        assert reading.cancelled()
        await generation.settle(0)
        assert pod.ledger.open_holds() == []


async def test_a_generation_that_nobody_revokes_runs_to_its_end(pod: Pod) -> None:
    story = Story(pod)
    generation = await story.begin()
    for finish in (FinishReason.NONE, FinishReason.STOP):
        story.say(finish)
    assert [token.token_id async for token in generation.tokens()] == [40, 41]
    generation.refuse(REVOKED)
    assert (await generation.settle(2)).num_output_tokens == 2
