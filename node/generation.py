"""A head's session as the gateway sees it: tokens until the end, or until its key is revoked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from node.gateway.backend import BackendRefusal, Caller, GeneratedToken, Usage
from node.key_gate import Admission
from node.sessions.session import HeadSession


class Generation:
    """Implements `gateway.backend.Generation`. `on_end` is called once, after it was settled or not."""

    def __init__(
        self,
        caller: Caller,
        session: HeadSession,
        route_text: str,
        admission: Admission,
        on_end: Callable[[Generation], None],
    ) -> None:
        self.caller = caller
        self.head_session = session
        self._route_text = route_text
        self._admission = admission
        self._on_end = on_end
        self._refusal: BackendRefusal | None = None
        # Who waits for a token now.
        self._reader: asyncio.Task[object] | None = None

    @property
    def session(self) -> bytes:
        return self.head_session.terms.session

    @property
    def route_text(self) -> str:
        return self._route_text

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.head_session.terms.prompt_ids)

    def refuse(self, refusal: BackendRefusal) -> None:
        """No more tokens: `tokens` raises this, at once if it waits for one. What was given is settled."""
        if self._refusal is None:
            self._refusal = refusal
            if self._reader is not None:
                self._reader.cancel()

    async def tokens(self) -> AsyncGenerator[GeneratedToken, None]:
        async with aclosing(self.head_session.tokens()) as tokens:
            while True:
                try:
                    token = await self._next(tokens)
                except StopAsyncIteration:
                    return
                yield token

    async def _next(self, tokens: AsyncGenerator[GeneratedToken, None]) -> GeneratedToken:
        self._check()
        self._reader = reader = asyncio.current_task()
        try:
            return await anext(tokens)
        except asyncio.CancelledError:
            # Somebody else's cancellation (the client has gone) goes on, whatever was refused meanwhile.
            if reader is not None and self._was_refused and not reader.uncancel():
                self._check()
            raise
        finally:
            self._reader = None

    @property
    def _was_refused(self) -> bool:
        return self._refusal is not None

    def _check(self) -> None:
        if self._refusal is not None:
            raise self._refusal from None

    def delivered(self, num_output_tokens: int) -> None:
        self.head_session.num_delivered = num_output_tokens

    async def settle(self, num_output_tokens: int) -> Usage:
        try:
            usage = await self.head_session.settle(num_output_tokens)
            self._admission.end(usage.num_prompt_tokens + usage.num_output_tokens)
            return usage
        finally:
            self._admission.end()
            self._on_end(self)
