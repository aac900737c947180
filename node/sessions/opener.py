"""Opens a request's attempts: a route, its stages, the hold, the start.

It decides when to try another route and when to give up. Frames travel over `node/links`, routes come from
placement; the ledger is behind `holds.py`.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from ledger.rate_card import RateCard
from ledger.receipt import Sign
from node.engine.prefix_hashes import prefix_hashes
from node.gateway.backend import NoRoute
from node.links.frames import (
    ErrorCode,
    Sampling,
    SessionError,
    SessionOpened,
    Stage,
    StartSession,
)
from node.links.head_links import HeadLinks
from node.links.port import LinkDown, LinkFull
from node.links.subscriptions import LinkLost, Received, Subscription
from node.models.manifest import Manifest
from node.sessions.attempt import Attempt
from node.sessions.authorization import Authorize
from node.sessions.holds import Holds
from node.sessions.receipts import SessionReceipts
from node.sessions.terms import SessionTerms

CONNECT_TIMEOUT_S = 5.0
OPEN_TIMEOUT_S = 10.0
# How long a request waits for KV room or for a route before it is told that there is none.
WAIT_FOR_ROOM_S = 60.0
WAIT_FOR_ROUTE_S = 5.0
RETRY_DELAY_S = (0.05, 0.25)

# Preempted: before it was started.
_WORTH_WAITING = frozenset({ErrorCode.NO_KV_ROOM, ErrorCode.PREEMPTED})
_WORTH_ANOTHER_ROUTE = frozenset(
    {
        *_WORTH_WAITING,
        ErrorCode.KV_BUDGET_TOO_SMALL,
        ErrorCode.UNKNOWN_SHARD,
        ErrorCode.NEXT_HOP_UNREACHABLE,
        ErrorCode.SHUTTING_DOWN,
        ErrorCode.UNSIGNED_LIMIT,
        ErrorCode.INTERNAL,
    }
)

FindRoute = Callable[[bytes, frozenset[bytes]], tuple[Stage, ...]]
"""`find_route(model, avoided_nodes)`: the cheapest live route. Raises NoRoute."""


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """One prompt to continue, and who pays for it; `authorize` when that is not this node's own member."""

    payer: bytes
    key_id: bytes
    model: bytes
    manifest: Manifest
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    authorize: Authorize | None = None


@dataclass(frozen=True, slots=True)
class Opening:
    """What is to be opened, and for how long that is tried. `token_ids` are output of earlier attempts."""

    request: SessionRequest
    rate_card: RateCard
    deadline_ms: int
    token_ids: tuple[int, ...] = ()
    avoided: frozenset[bytes] = frozenset()
    wait_for_room_s: float = WAIT_FOR_ROOM_S
    wait_for_route_s: float = WAIT_FOR_ROUTE_S


class _NotOpened(Exception):
    """One attempt over one route failed; `node` is the stage to blame."""

    def __init__(self, node: bytes, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.node = node
        self.code = code


class Opener:
    def __init__(
        self,
        *,
        pod: bytes,
        node: bytes,
        sign: Sign,
        links: HeadLinks,
        holds: Holds,
        find_route: FindRoute,
        clock_ms: Callable[[], int],
        max_num_draft_tokens: int,
    ) -> None:
        self._pod = pod
        self._node = node
        self._sign = sign
        self._links = links
        self._holds = holds
        self._find_route = find_route
        self._clock_ms = clock_ms
        self._max_num_draft_tokens = max_num_draft_tokens

    async def open(self, opening: Opening) -> Attempt:
        """Try routes until one opens, waiting for room or for a route within the opening's limits."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        avoided, too_small = opening.avoided, ""
        while True:
            waited_s = loop.time() - began_s
            if self._clock_ms() >= opening.deadline_ms:
                raise NoRoute("the request's deadline has passed")
            try:
                route = self._find_route(opening.request.model, avoided)
            except NoRoute:
                if too_small:
                    raise NoRoute(too_small) from None
                if waited_s > opening.wait_for_route_s:
                    raise
                avoided = frozenset()
            else:
                try:
                    terms = self._terms(opening, route)
                    return await self._open_route(terms, opening.request.authorize)
                except _NotOpened as refusal:
                    if _is_final(refusal, opening, avoided, waited_s):
                        raise NoRoute(str(refusal)) from None
                    if refusal.code not in _WORTH_WAITING:
                        avoided |= {refusal.node}
                    if refusal.code is ErrorCode.KV_BUDGET_TOO_SMALL:
                        too_small = str(refusal)
            await asyncio.sleep(random.uniform(*RETRY_DELAY_S))  # noqa: S311 - spreads retries, no secret

    def _terms(self, opening: Opening, route: tuple[Stage, ...]) -> SessionTerms:
        """A new session for each attempt: what a stage still says of an earlier one is not heard."""
        request = opening.request
        prompt_ids = request.prompt_ids + opening.token_ids
        return SessionTerms(
            session=secrets.token_bytes(16),
            head=self._node,
            payer=request.payer,
            key_id=request.key_id,
            model=request.model,
            manifest=request.manifest,
            route=route,
            prompt_ids=prompt_ids,
            sampling=request.sampling,
            rate_card=opening.rate_card,
            deadline_ms=opening.deadline_ms,
            num_output_tokens_before=len(opening.token_ids),
            prefix_hashes=prefix_hashes(request.model, self._node, prompt_ids),
            max_num_draft_tokens=self._max_num_draft_tokens,
        )

    async def _open_route(self, terms: SessionTerms, authorize: Authorize | None) -> Attempt:
        """Stages first, so that an attempt that fails leaves nothing in the ledger; none computes before
        it is started, and that is after the hold is durable."""
        subscription = self._links.subscribe(terms.session)
        receipts = SessionReceipts(self._pod, terms, self._sign)
        attempt = Attempt(terms, self._links, subscription, receipts)
        is_held = False
        try:
            await self._connect(terms)
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                num_cached_tokens = await self._open_stages(terms, subscription)
            await self._holds.open(terms, authorize)
            is_held = True
            self._links.send(terms.route[0].node, StartSession(terms.session, num_cached_tokens))
        except BaseException as error:
            attempt.close_stages()
            subscription.close()
            if is_held:
                await self._holds.void(terms.session)
            match error:
                case TimeoutError():
                    last = terms.route[-1].node
                    raise _NotOpened(last, ErrorCode.DEADLINE, "a stage did not answer in time") from None
                case LinkDown() | LinkFull():
                    raise _NotOpened(
                        terms.route[0].node, ErrorCode.NEXT_HOP_UNREACHABLE, str(error)
                    ) from None
            raise
        receipts.begin(num_cached_tokens)
        return attempt

    async def _connect(self, terms: SessionTerms) -> None:
        async def connect_stage(stage: Stage) -> None:
            try:
                await self._links.connect(stage.node, stage.data_address, CONNECT_TIMEOUT_S)
            except LinkDown as error:
                raise _NotOpened(stage.node, ErrorCode.NEXT_HOP_UNREACHABLE, str(error)) from None

        results = await asyncio.gather(*(connect_stage(s) for s in terms.route), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _open_stages(self, terms: SessionTerms, subscription: Subscription) -> int:
        """One round trip: every stage reserves its KV room. Returns how many tokens all have cached."""
        for index, stage in enumerate(terms.route):
            self._links.send(stage.node, terms.open_frame(index))
        on_route = {stage.node for stage in terms.route}
        num_cached_tokens: dict[bytes, int] = {}
        while len(num_cached_tokens) < len(on_route):
            match await subscription.next():
                case Received(node=node, frame=SessionOpened() as opened) if node in on_route:
                    num_cached_tokens[node] = opened.num_cached_tokens
                case Received(node=node, frame=SessionError(code=code, message=message)) if node in on_route:
                    raise _NotOpened(node, code, message)
                case LinkLost(node=node, reason=reason) if node in on_route:
                    raise _NotOpened(node, ErrorCode.NEXT_HOP_UNREACHABLE, f"a stage's link: {reason}")
                case _:
                    pass
        return min(num_cached_tokens.values())


def _is_final(refusal: _NotOpened, opening: Opening, avoided: frozenset[bytes], waited_s: float) -> bool:
    """Whether trying again is of no use, or has been tried for long enough."""
    if refusal.code not in _WORTH_ANOTHER_ROUTE:
        return True
    if refusal.code is ErrorCode.KV_BUDGET_TOO_SMALL and refusal.node in avoided:
        return True
    is_waiting = refusal.code in _WORTH_WAITING
    return waited_s > (opening.wait_for_room_s if is_waiting else opening.wait_for_route_s)
