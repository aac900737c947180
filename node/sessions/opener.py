"""Opens a request's attempts: a route, its stages, the hold, the start.

It decides when to try another route and when to give up. Frames travel over `node/links`, routes come from
placement; the ledger is behind `holds.py`.
"""

from __future__ import annotations

import asyncio
import math
import random
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from ledger.rate_card import RateCard
from ledger.receipt import Sign
from node.engine.prefix_hashes import prefix_hashes
from node.gateway.backend import NoRoute, WaitedTooLong
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
from node.sessions.waiting_line import LineFull, WaitingLine

CONNECT_TIMEOUT_S = 5.0
OPEN_TIMEOUT_S = 10.0
# How long a request waits for KV room or for a route before it is told that there is none.
WAIT_FOR_ROOM_S = 60.0
WAIT_FOR_ROUTE_S = 5.0
RETRY_DELAY_S = (0.05, 0.15)
# What a client that waited in vain is told.
RETRY_AFTER_S = 10
# After a refusal for want of room stages are opened one after the other for so long.
CONTENDED_S = 5.0

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

CheckCredit = Callable[[bytes], None]
"""Called when a member's request has to wait. Raises QuotaExceeded when it is past its credit line."""


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


@dataclass(slots=True)
class _Search:
    """What one opening has found out so far."""

    avoided: frozenset[bytes]
    began_s: float
    too_small: str = ""


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
        line: WaitingLine,
        check_credit: CheckCredit,
    ) -> None:
        self._pod = pod
        self._node = node
        self._sign = sign
        self._links = links
        self._holds = holds
        self._find_route = find_route
        self._clock_ms = clock_ms
        self._max_num_draft_tokens = max_num_draft_tokens
        self._line = line
        self._check_credit = check_credit
        self._contended_until_s = -math.inf

    async def open(self, opening: Opening) -> Attempt:
        """Try routes until one opens; wait for room or for a route within the opening's limits. Raises
        NoRoute, QuotaExceeded or WaitedTooLong."""
        request, is_replay = opening.request, bool(opening.token_ids)
        search = _Search(opening.avoided, asyncio.get_running_loop().time())
        if is_replay or not self._line.is_behind(request.payer, request.model):
            attempt = await self._search(opening, search, may_wait=is_replay)
            if attempt is not None:
                return attempt
        self._check_credit(request.payer)
        try:
            async with (
                asyncio.timeout(opening.wait_for_room_s) as patience,
                self._line.turn(request.payer, request.model),
            ):
                # Those before it have opened holds meanwhile.
                self._check_credit(request.payer)
                patience.reschedule(None)
                attempt = await self._search(opening, search, may_wait=True)
        except LineFull as full:
            raise WaitedTooLong(str(full), RETRY_AFTER_S) from None
        except TimeoutError:
            raise _waited_too_long(opening) from None
        assert attempt is not None
        return attempt

    async def _search(self, opening: Opening, search: _Search, may_wait: bool) -> Attempt | None:
        """None when there is no room now and it may not wait."""
        while True:
            waited_s = asyncio.get_running_loop().time() - search.began_s
            if self._clock_ms() >= opening.deadline_ms:
                raise NoRoute("the request's deadline has passed")
            try:
                route = self._find_route(opening.request.model, search.avoided)
            except NoRoute:
                if search.too_small:
                    raise NoRoute(search.too_small) from None
                if waited_s > opening.wait_for_route_s:
                    raise
                search.avoided = frozenset()
            else:
                try:
                    return await self._open_route(self._terms(opening, route))
                except _NotOpened as refusal:
                    if _is_final(refusal, opening, search.avoided, waited_s):
                        raise _final(refusal, opening) from None
                    if refusal.code is ErrorCode.NO_KV_ROOM and not may_wait:
                        return None
                    if refusal.code not in _WORTH_WAITING:
                        search.avoided |= {refusal.node}
                    if refusal.code is ErrorCode.KV_BUDGET_TOO_SMALL:
                        search.too_small = str(refusal)
            await asyncio.sleep(random.uniform(*RETRY_DELAY_S))  # noqa: S311 - spreads retries, no secret

    def _terms(self, opening: Opening, route: tuple[Stage, ...]) -> SessionTerms:
        """A new session for each attempt: what a stage still says of an earlier one is not heard."""
        request = opening.request
        prompt_ids = request.prompt_ids + opening.token_ids
        terms = SessionTerms(
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
        if request.authorize is None:
            return terms
        return replace(terms, authorization=request.authorize(terms.hold()))

    async def _open_route(self, terms: SessionTerms) -> Attempt:
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
            await self._holds.open(terms)
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
        """One round trip: every stage reserves its KV room. Returns how many tokens all have cached.

        Where there was no room lately it is two: the first stage, which may let a session wait, and then the
        others, so that nobody keeps room at one stage while waiting at another.
        """
        stages = list(enumerate(terms.route))
        loop = asyncio.get_running_loop()
        batches = [stages] if loop.time() > self._contended_until_s else [stages[:1], stages[1:]]
        num_cached_tokens: dict[bytes, int] = {}
        for batch in batches:
            for index, stage in batch:
                self._links.send(stage.node, terms.open_frame(index))
            try:
                await self._hear_opened({stage.node for _, stage in batch}, num_cached_tokens, subscription)
            except _NotOpened as refusal:
                if refusal.code is ErrorCode.NO_KV_ROOM:
                    self._contended_until_s = loop.time() + CONTENDED_S
                raise
        return min(num_cached_tokens.values())

    async def _hear_opened(
        self, nodes: set[bytes], num_cached_tokens: dict[bytes, int], subscription: Subscription
    ) -> None:
        """Until all of `nodes` have opened."""
        while not nodes <= num_cached_tokens.keys():
            match await subscription.next():
                case Received(node=node, frame=SessionOpened() as opened) if node in nodes:
                    num_cached_tokens[node] = opened.num_cached_tokens
                case Received(node=node, frame=SessionError(code=code, message=message)) if (
                    node in nodes or node in num_cached_tokens
                ):
                    raise _NotOpened(node, code, message)
                case LinkLost(node=node, reason=reason) if node in nodes or node in num_cached_tokens:
                    raise _NotOpened(node, ErrorCode.NEXT_HOP_UNREACHABLE, f"a stage's link: {reason}")
                case _:
                    pass


def _is_final(refusal: _NotOpened, opening: Opening, avoided: frozenset[bytes], waited_s: float) -> bool:
    """Whether trying again is of no use, or has been tried for long enough."""
    if refusal.code not in _WORTH_ANOTHER_ROUTE:
        return True
    if refusal.code is ErrorCode.KV_BUDGET_TOO_SMALL and refusal.node in avoided:
        return True
    is_waiting = refusal.code in _WORTH_WAITING
    return waited_s > (opening.wait_for_room_s if is_waiting else opening.wait_for_route_s)


def _final(refusal: _NotOpened, opening: Opening) -> NoRoute | WaitedTooLong:
    if refusal.code in _WORTH_WAITING and not opening.token_ids:
        return _waited_too_long(opening)
    return NoRoute(str(refusal))


def _waited_too_long(opening: Opening) -> WaitedTooLong:
    line = f"the pod is busy: no room for {opening.wait_for_room_s:.0f} s"
    return WaitedTooLong(line, RETRY_AFTER_S)
