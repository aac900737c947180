"""The head: opens a session for one request (hold, route, stages) and ends it in the books.

It decides when to try another route and when to give up. Frames travel over `node/links`, entries over the
ledger's thread, routes come from placement; a running session's tokens are `session.py`'s business.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ledger.entry import HoldOpened, HoldSettled, HoldVoided, VoidReason
from ledger.rate_card import RateCard
from ledger.receipt import Sign
from node.engine.prefix_hashes import prefix_hashes
from node.gateway.backend import NoRoute, Usage
from node.ledger_thread import LedgerThread
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
from node.sessions.receipts import SessionReceipts
from node.sessions.session import HeadSession
from node.sessions.terms import SessionTerms

CONNECT_TIMEOUT_S = 5.0
OPEN_TIMEOUT_S = 10.0
# How long a request waits for KV room or for a route before it is told that there is none.
WAIT_FOR_ROOM_S = 60.0
WAIT_FOR_ROUTE_S = 5.0
# One that has begun waits for room as long as it lives, and for a route until the pod has seen what is gone.
WAIT_FOR_ANOTHER_ROUTE_S = 30.0
RETRY_DELAY_S = (0.05, 0.25)
SESSION_DEADLINE_S = 30 * 60
# The hold outlives the session, so that a stage never works against an expired one.
HOLD_GRACE_S = 60
MAX_NUM_SESSIONS = 1024

# Preempted: before it was started.
_WORTH_WAITING = frozenset({ErrorCode.NO_KV_ROOM, ErrorCode.PREEMPTED})
_WORTH_ANOTHER_ROUTE = frozenset(
    {
        *_WORTH_WAITING,
        ErrorCode.KV_BUDGET_TOO_SMALL,
        ErrorCode.UNKNOWN_SHARD,
        ErrorCode.NEXT_HOP_UNREACHABLE,
        ErrorCode.SHUTTING_DOWN,
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
class _Opening:
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


class Head:
    """Every session of this node's gateway, from hold to settlement."""

    def __init__(
        self,
        *,
        pod: bytes,
        node: bytes,
        sign: Sign,
        links: HeadLinks,
        ledger: LedgerThread,
        find_route: FindRoute,
        clock_ms: Callable[[], int],
    ) -> None:
        self._pod = pod
        self._node = node
        self._sign = sign
        self._links = links
        self._ledger = ledger
        self._find_route = find_route
        self._clock_ms = clock_ms
        self._sessions: set[bytes] = set()
        self._endings: set[asyncio.Task[Usage]] = set()

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    async def open(self, request: SessionRequest, rate_card: RateCard) -> HeadSession:
        """Route, stages, hold, start. Raises NoRoute with nothing left open; cancelled, likewise."""
        if len(self._sessions) >= MAX_NUM_SESSIONS:
            raise NoRoute(f"this node already runs {MAX_NUM_SESSIONS} requests")
        opening = _Opening(request, rate_card, self._clock_ms() + SESSION_DEADLINE_S * 1000)
        attempt = await self._open_somewhere(opening)
        session_id = attempt.terms.session
        self._sessions.add(session_id)
        return HeadSession(
            attempt, partial(self._replay, opening), self._end, partial(self._sessions.discard, session_id)
        )

    async def _replay(self, opening: _Opening, token_ids: tuple[int, ...], suspect: bytes | None) -> Attempt:
        """The same request again after `token_ids`, not over `suspect`. Raises NoRoute."""
        again = replace(
            opening,
            token_ids=token_ids,
            avoided=frozenset(() if suspect is None else (suspect,)),
            wait_for_room_s=(opening.deadline_ms - self._clock_ms()) / 1000,
            wait_for_route_s=WAIT_FOR_ANOTHER_ROUTE_S,
        )
        return await self._open_somewhere(again)

    def _terms(self, opening: _Opening, route: tuple[Stage, ...]) -> SessionTerms:
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
        )

    async def _hold(self, terms: SessionTerms, authorize: Authorize | None) -> None:
        """Open the hold. Whoever stops waiting leaves none open: what was queued is written, then voided."""
        hold = HoldOpened(
            session=terms.session,
            payer=terms.payer,
            key_id=terms.key_id,
            model=terms.model,
            amount_microcredits=terms.worst_case_microcredits(),
            expires_at_ms=terms.deadline_ms + HOLD_GRACE_S * 1000,
            rate_card_version=terms.rate_card.version,
        )
        if authorize is not None:
            hold = replace(hold, authorization=authorize(hold))
        opening = asyncio.ensure_future(self._ledger.append(hold))
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            await self._own(self._void_after(opening, terms.session))
            raise

    async def _void_after(self, opening: asyncio.Future[Any], session: bytes) -> Usage:
        await asyncio.wait([opening])
        if opening.exception() is None:
            await self._ledger.append(HoldVoided(session, VoidReason.CANCELLED))
        return Usage(0, 0, 0)

    async def _own(self, work: Coroutine[Any, Any, Usage]) -> Usage:
        """Run to the end even if the caller is cancelled: books are never left half written."""
        task = asyncio.create_task(work)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)
        return await asyncio.shield(task)

    async def _open_somewhere(self, opening: _Opening) -> Attempt:
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
            await self._hold(terms, authorize)
            is_held = True
            self._links.send(terms.route[0].node, StartSession(terms.session, num_cached_tokens))
        except BaseException as error:
            attempt.close_stages()
            subscription.close()
            if is_held:
                await self._own(self._void(terms.session))
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

    async def _void(self, session: bytes) -> Usage:
        await self._ledger.append(HoldVoided(session, VoidReason.FAILED))
        return Usage(0, 0, 0)

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

    def _end(self, attempt: Attempt, num_output_tokens: int, failed: bool) -> asyncio.Future[Usage]:
        """Settle what was delivered, or void; see `HeadSession.settle`."""
        task = asyncio.create_task(self._finish(attempt, num_output_tokens, failed))
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)
        return task

    async def _finish(self, attempt: Attempt, num_output_tokens: int, failed: bool) -> Usage:
        terms = attempt.terms
        # A stage signs no count below its last one: what was signed is the least that is settled.
        num_output_tokens = max(num_output_tokens, attempt.num_signed_tokens)
        try:
            if failed or num_output_tokens == 0:
                attempt.close_stages()
                reason = VoidReason.FAILED if failed else VoidReason.CANCELLED
                await self._ledger.append(HoldVoided(terms.session, reason))
                return Usage(0, 0, 0)
            receipts = await attempt.collect_receipts(num_output_tokens)
            num_prompt_tokens, num_cached_tokens = terms.num_charged_prompt_tokens, attempt.num_cached_tokens
            settled = HoldSettled(
                terms.session, num_prompt_tokens, num_cached_tokens, num_output_tokens, receipts
            )
            await self._ledger.append(settled)
            return Usage(num_prompt_tokens, num_cached_tokens, num_output_tokens)
        finally:
            attempt.release()

    async def recover(self) -> int:
        """Void the holds that this node's earlier life left open. Returns how many."""
        mine = await self._ledger.run(
            lambda ledger: [hold for hold in ledger.open_holds() if hold.author == self._node]
        )
        for hold in mine:
            await self._ledger.append(HoldVoided(hold.session, VoidReason.FAILED))
        return len(mine)

    async def close(self, timeout_s: float) -> None:
        """Wait for endings that are being written."""
        if self._endings:
            await asyncio.wait(set(self._endings), timeout=timeout_s)


def _is_final(refusal: _NotOpened, opening: _Opening, avoided: frozenset[bytes], waited_s: float) -> bool:
    """Whether trying again is of no use, or has been tried for long enough."""
    if refusal.code not in _WORTH_ANOTHER_ROUTE:
        return True
    if refusal.code is ErrorCode.KV_BUDGET_TOO_SMALL and refusal.node in avoided:
        return True
    is_waiting = refusal.code in _WORTH_WAITING
    return waited_s > (opening.wait_for_room_s if is_waiting else opening.wait_for_route_s)
