"""A running session at its head: tokens as they come, receipts as they fall due, one ending.

Keeps the terms and every token so far: what a replay over another route would need. Opening and the books are
`head.py`'s business.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

from ledger.receipt import SignedReceipt
from node.gateway.backend import GeneratedToken, GenerationFailed, Usage
from node.links.frames import (
    CloseSession,
    FinishReason,
    ReceiptSigned,
    SessionError,
    StageTiming,
    TokenBatch,
    TokenItem,
)
from node.links.head_links import HeadLinks
from node.links.port import LinkDown, LinkFull
from node.links.subscriptions import Event, LinkLost, Received, Subscription
from node.sessions.receipts import SessionReceipts
from node.sessions.terms import SessionTerms

# Liveness pings end a frozen or dead stage within seconds; this is the bound for one that lives but is stuck.
STALL_TIMEOUT_S = 120.0
CO_SIGN_TIMEOUT_S = 3.0

End = Callable[["HeadSession", int], Awaitable[Usage]]


class HeadSession:
    """`tokens` once, `settle` once; whatever is cancelled, `settle` ends the session at every stage."""

    def __init__(
        self,
        terms: SessionTerms,
        links: HeadLinks,
        subscription: Subscription,
        receipts: SessionReceipts,
        end: End,
    ) -> None:
        self.terms = terms
        self.token_ids: list[int] = []
        self.timings: dict[int, StageTiming] = {}
        self.failed = False
        self.began_s = time.monotonic()
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self._links = links
        self._subscription = subscription
        self._receipts = receipts
        self._end = end
        self._finished = False

    async def tokens(self) -> AsyncGenerator[GeneratedToken, None]:
        """Until a finish reason. Raises GenerationFailed when a stage or a link gives out."""
        while not self._finished:
            try:
                async with asyncio.timeout(STALL_TIMEOUT_S):
                    event = await self._subscription.next()
            except TimeoutError:
                raise self._failure(f"no token came for {STALL_TIMEOUT_S:.0f} s") from None
            for token in self._take(event):
                yield token

    def _take(self, event: Event) -> list[GeneratedToken]:
        """What one event brings: tokens from the last stage only, errors from any stage of the route."""
        route = self.terms.route
        match event:
            case Received(node=node, frame=TokenBatch(items=items)) if node == route[-1].node:
                return [self._take_token(item) for item in items]
            case Received(node=node, frame=SessionError(message=message)) if self._is_on_route(node):
                raise self._failure(f"the stage {self._stage_text(node)} gave up: {message}")
            case LinkLost(node=node, reason=reason) if self._is_on_route(node):
                raise self._failure(f"the stage {self._stage_text(node)} is gone: {reason}")
            case _:
                self._note(event)
                return []

    def _is_on_route(self, node: bytes) -> bool:
        return any(stage.node == node for stage in self.terms.route)

    def _stage_text(self, node: bytes) -> str:
        return ",".join(f"[{s.start_layer}:{s.end_layer})" for s in self.terms.route if s.node == node)

    def _failure(self, message: str) -> GenerationFailed:
        self.failed = True
        return GenerationFailed(message)

    def _take_token(self, item: TokenItem) -> GeneratedToken:
        if self._finished:
            raise self._failure("a token came after the last one")
        expected = len(self.terms.prompt_ids) + len(self.token_ids)
        if item.position != expected:
            raise self._failure(f"a token for position {item.position} came, {expected} was due")
        now_s = time.monotonic()
        self.first_token_s = self.first_token_s or now_s
        self.last_token_s = now_s
        self.token_ids.append(item.token_id)
        finish_reason = item.finish_reason
        if len(self.token_ids) == self.terms.sampling.max_num_output_tokens:
            # Whatever the stage means: past the limit nothing is signed, for the hold covers no more.
            finish_reason = finish_reason or FinishReason.LENGTH
        self._finished = finish_reason is not FinishReason.NONE
        if self._receipts.is_due(len(self.token_ids)) and not self._finished:
            self._send_receipts(len(self.token_ids))
        return GeneratedToken(item.token_id, finish_reason)

    def _note(self, event: Event) -> None:
        match event:
            case Received(frame=ReceiptSigned(receipt=receipt)):
                self._receipts.accept(receipt)
            case Received(frame=StageTiming() as timing):
                self.timings[timing.stage_index] = timing
            case _:
                pass

    def _send_receipts(self, num_output_tokens: int) -> None:
        for stage, frame in zip(self.terms.route, self._receipts.sign(num_output_tokens), strict=True):
            with contextlib.suppress(LinkDown, LinkFull):
                self._links.send(stage.node, frame)

    async def collect_receipts(self, num_output_tokens: int) -> tuple[SignedReceipt, ...]:
        """Sign this many, close every stage, and wait a little for their signatures.

        A stage that is gone or gave up is settled at what it signed last; it can claim the rest itself.
        """
        self._send_receipts(num_output_tokens)
        for stage in self.terms.route:
            with contextlib.suppress(LinkDown, LinkFull):
                self._links.send(stage.node, CloseSession(self.terms.session))
        waiting_for = {stage.node: index for index, stage in enumerate(self.terms.route)}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CO_SIGN_TIMEOUT_S):
                while waiting_for:
                    event = await self._subscription.next()
                    self._note(event)
                    index = waiting_for.get(event.node)
                    if index is not None and (_is_last(event) or self._receipts.is_co_signed(index)):
                        del waiting_for[event.node]
        return self._receipts.co_signed()

    async def settle(self, num_output_tokens: int) -> Usage:
        """End the session: settled at `num_output_tokens` or what is signed; voided at 0 or if it failed."""
        return await self._end(self, min(num_output_tokens, len(self.token_ids)))

    @property
    def num_signed_tokens(self) -> int:
        return self._receipts.num_signed_tokens

    def release(self) -> None:
        self._subscription.close()

    @property
    def tokens_per_s(self) -> float | None:
        """Decode speed after the first token; None before there are two."""
        if self.first_token_s is None or self.last_token_s is None or len(self.token_ids) < 2:
            return None
        return (len(self.token_ids) - 1) / max(self.last_token_s - self.first_token_s, 1e-9)


def _is_last(event: Event) -> bool:
    """Whether this stage will say nothing more of the session."""
    return isinstance(event, LinkLost) or isinstance(event.frame, SessionError)
