"""One try at a request: a session open at the stages of one route, its tokens and its receipts.

A request is mostly one attempt. When a stage preempts it, or is lost, the next attempt replays what came so
far; which, and the books, are others' business.
"""

from __future__ import annotations

import asyncio
import contextlib

from ledger.receipt import SignedReceipt
from node.gateway.backend import GeneratedToken
from node.links.frames import (
    CloseSession,
    ErrorCode,
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
# A long prompt, or one behind others, takes its time.
FIRST_TOKEN_TIMEOUT_S = 1200.0
CO_SIGN_TIMEOUT_S = 3.0
# Tokens that wait to become text (half a character, the beginning of a stop string) are not signed for: if
# the client goes now, they were not delivered. More than these are, for a stage must not wait for ever.
MAX_NUM_HELD_BACK = 16

# After these a stage still knows what it did, and signs for it.
_STILL_SIGNS = frozenset({ErrorCode.PREEMPTED, ErrorCode.NEXT_HOP_UNREACHABLE})


class AttemptLost(Exception):
    """No more tokens will come. `suspect` is the node that seems to be the cause, if any."""

    def __init__(self, code: ErrorCode, message: str, suspect: bytes | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.suspect = suspect


class Attempt:
    """`next_tokens` until `is_finished`; then, whatever happened, `collect_receipts` or `close_stages`."""

    def __init__(
        self,
        terms: SessionTerms,
        links: HeadLinks,
        subscription: Subscription,
        receipts: SessionReceipts,
    ) -> None:
        self.terms = terms
        self.num_tokens = 0
        self.is_finished = False
        self.timings: dict[int, StageTiming] = {}
        self._links = links
        self._subscription = subscription
        self._receipts = receipts
        self._gone: set[bytes] = set()
        self._is_closed = False

    @property
    def num_signed_tokens(self) -> int:
        return self._receipts.num_signed_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Of those that are charged for."""
        return self._receipts.num_cached_tokens

    async def next_tokens(self) -> list[GeneratedToken]:
        """What the next event brings, which may be none. Raises AttemptLost."""
        try:
            timeout_s = STALL_TIMEOUT_S if self.num_tokens else FIRST_TOKEN_TIMEOUT_S
            async with asyncio.timeout(timeout_s):
                event = await self._subscription.next()
        except TimeoutError:
            raise AttemptLost(ErrorCode.DEADLINE, f"no token came for {timeout_s:.0f} s") from None
        return self._take(event)

    def _take(self, event: Event) -> list[GeneratedToken]:
        """Tokens from the last stage only, errors from any stage of the route."""
        route = self.terms.route
        match event:
            case Received(node=node, frame=TokenBatch(items=items)) if node == route[-1].node:
                return [self._take_token(item) for item in items]
            case Received(node=node, frame=SessionError() as error) if self._is_on_route(node):
                self._note(event)
                message = f"the stage {self._stage_text(node)} gave up: {error.message}"
                raise AttemptLost(error.code, message, self._suspect(node, error.code))
            case LinkLost(node=node, reason=reason) if self._is_on_route(node):
                self._note(event)
                message = f"the stage {self._stage_text(node)} is gone: {reason}"
                raise AttemptLost(ErrorCode.NEXT_HOP_UNREACHABLE, message, node)
            case _:
                self._note(event)
                return []

    def _suspect(self, node: bytes, code: ErrorCode) -> bytes | None:
        """A stage that cannot reach its next hop blames that one; a wrong guess is found out when opening."""
        if code is ErrorCode.PREEMPTED:
            return None
        nodes = [stage.node for stage in self.terms.route]
        if code is ErrorCode.NEXT_HOP_UNREACHABLE:
            return nodes[(nodes.index(node) + 1) % len(nodes)]
        return node

    def _is_on_route(self, node: bytes) -> bool:
        return any(stage.node == node for stage in self.terms.route)

    def _stage_text(self, node: bytes) -> str:
        return ",".join(f"[{s.start_layer}:{s.end_layer})" for s in self.terms.route if s.node == node)

    def _take_token(self, item: TokenItem) -> GeneratedToken:
        terms = self.terms
        if self.is_finished:
            raise AttemptLost(ErrorCode.BAD_FRAME, "a token came after the last one")
        expected = len(terms.prompt_ids) + self.num_tokens
        if item.position != expected:
            message = f"a token for position {item.position} came, {expected} was due"
            raise AttemptLost(ErrorCode.BAD_FRAME, message)
        self._check_logprobs(item)
        self.num_tokens += 1
        finish_reason = item.finish_reason
        if self.num_tokens == terms.max_num_new_tokens:
            # Whatever the stage means: past the limit nothing is signed, for the hold covers no more.
            finish_reason = finish_reason or FinishReason.LENGTH
        self.is_finished = finish_reason is not FinishReason.NONE
        return GeneratedToken(item.token_id, finish_reason, item.logprob, item.top_logprobs)

    def _check_logprobs(self, item: TokenItem) -> None:
        """What was asked for, and nothing that no tokenizer can spell."""
        num_top = self.terms.sampling.num_top_logprobs
        was_told = item.logprob is not None
        vocab_size = self.terms.manifest.vocab_size
        is_fine = (
            was_told == (num_top >= 0)
            and len(item.top_logprobs) <= max(0, num_top)
            and all(token_id < vocab_size for token_id, _ in item.top_logprobs)
        )
        if not is_fine:
            raise AttemptLost(ErrorCode.BAD_FRAME, "a token came without the logprobs that were asked for")

    def _note(self, event: Event) -> None:
        match event:
            case Received(frame=ReceiptSigned(receipt=receipt)):
                self._receipts.accept(receipt)
            case Received(node=node, frame=StageTiming(stage_index=index) as timing):
                if index < len(self.terms.route) and self.terms.route[index].node == node:
                    self.timings[index] = timing
            case LinkLost(node=node):
                self._gone.add(node)
            case Received(node=node, frame=SessionError(code=code)) if code not in _STILL_SIGNS:
                self._gone.add(node)
            case _:
                pass

    def sign_delivered(self, num_output_tokens: int) -> None:
        """Sign for what the client was given, if that is due. The end has a receipt of its own."""
        num_output_tokens = max(num_output_tokens, self.num_tokens - MAX_NUM_HELD_BACK)
        if self._receipts.is_due(num_output_tokens) and not self.is_finished:
            self._send_receipts(num_output_tokens)

    def _send_receipts(self, num_output_tokens: int) -> None:
        for stage, frame in zip(self.terms.route, self._receipts.sign(num_output_tokens), strict=True):
            with contextlib.suppress(LinkDown, LinkFull):
                self._links.send(stage.node, frame)

    async def collect_receipts(self, num_output_tokens: int) -> tuple[SignedReceipt, ...]:
        """Sign this many, close every stage, and wait a little for their signatures.

        A stage that is gone or gave up is settled at what it signed last; it can claim the rest itself.
        """
        if not self._is_closed:
            self.stop(num_output_tokens)
        waiting_for = {stage.node: index for index, stage in enumerate(self.terms.route)}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CO_SIGN_TIMEOUT_S):
                while waiting_for := self._unsigned(waiting_for):
                    self._note(await self._subscription.next())
        return self._receipts.co_signed()

    def _unsigned(self, waiting_for: dict[bytes, int]) -> dict[bytes, int]:
        """Those that may yet sign."""
        return {
            node: index
            for node, index in waiting_for.items()
            if node not in self._gone and not self._receipts.is_co_signed(index)
        }

    def stop(self, num_output_tokens: int) -> None:
        """Sign this many (none: nothing) and close every stage, once; their signatures are for later."""
        self._is_closed = True
        if num_output_tokens > 0:
            self._send_receipts(num_output_tokens)
        self.close_stages()

    def close_stages(self) -> None:
        for stage in self.terms.route:
            with contextlib.suppress(LinkDown, LinkFull):
                self._links.send(stage.node, CloseSession(self.terms.session))

    def release(self) -> None:
        """Timings that came while the books were written are the last that is heard."""
        while (event := self._subscription.next_now()) is not None:
            self._note(event)
        self._subscription.close()
