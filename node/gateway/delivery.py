"""One generation on its way to a client: tokens to text, what was delivered, and the settlement.

A delivery is closed exactly once whatever happens (client gone, stage dead, node stopping): the settlement
runs as a task of its own, so that a cancelled request still waits for it and never starts it twice. Knows
nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from node.gateway.backend import GeneratedToken, Generation, GenerationFailed, TextTokenizer, Usage
from node.gateway.detokenizer import Detokenizer
from node.gateway.stop_strings import StopStrings
from node.gateway.token_logprobs import TokenLogprobs
from node.links.frames import FinishReason

SETTLE_TIMEOUT_S = 30.0

log = logging.getLogger(__name__)

FinishName = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text to send on. `num_output_tokens` counts from the start of the generation, this piece included.

    `logprobs` of the tokens since the last piece, if the request asked for them. Those that spell a stop
    string are among them (they were generated and count), an end-of-sequence token is not.
    """

    text: str
    num_output_tokens: int
    finish: FinishName | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


class Delivery:
    """`num_delivered` is what the client has been given, or what was gathered of a whole answer for it."""

    def __init__(
        self, generation: Generation, tokenizer: TextTokenizer, stops: Sequence[str], min_num_tokens: int
    ) -> None:
        self.generation = generation
        self.num_delivered = 0
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        self._num_chars = 0
        self._logprobs: list[TokenLogprobs] = []
        self._stops = StopStrings(stops)
        self._min_num_tokens = min_num_tokens
        self._settlement: asyncio.Task[Usage] | None = None

    async def pieces(self) -> AsyncGenerator[TextPiece, None]:
        """The text as it becomes certain; the last piece has a finish. Raises `GenerationFailed`."""
        num_tokens = 0
        async with aclosing(self.generation.tokens()) as tokens:
            async for token in tokens:
                num_tokens += 1
                text = self._detokenized(token)
                if num_tokens > self._min_num_tokens:
                    text = self._stops.push(text)
                finish = self._finish(token.finish_reason)
                if finish and not self._stops.found:
                    text += self._stops.flush()
                if text or finish:
                    logprobs, self._logprobs = tuple(self._logprobs), []
                    yield TextPiece(text, num_tokens, finish, logprobs)
                if finish:
                    return
        raise GenerationFailed("The generation ended before its last token.")

    def _detokenized(self, token: GeneratedToken) -> str:
        text = self._detokenizer.push(token.token_id)
        is_silent_end = token.finish_reason is FinishReason.STOP and not text
        if token.logprob is not None and not is_silent_end:
            self._logprobs.append(TokenLogprobs.of(token, self._tokenizer, self._num_chars))
        self._num_chars += len(text)
        return text

    def _finish(self, reason: FinishReason) -> FinishName | None:
        if self._stops.found or reason is FinishReason.STOP:
            return "stop"
        return "length" if reason is FinishReason.LENGTH else None

    def delivered(self, num_output_tokens: int) -> None:
        """So many tokens have been written to the client."""
        self.num_delivered = num_output_tokens
        self.generation.delivered(num_output_tokens)

    async def settle(self) -> Usage:
        """Settle at `num_delivered`, the first time it is called; later calls get the same usage."""
        if self._settlement is None:
            self._settlement = asyncio.create_task(self.generation.settle(self.num_delivered))
        async with asyncio.timeout(SETTLE_TIMEOUT_S):
            return await asyncio.shield(self._settlement)

    async def close(self) -> Usage:
        """Settle if that has not been done. The request's own error is the one worth raising."""
        try:
            return await self.settle()
        except Exception:
            log.exception("session %s could not be settled", self.generation.session.hex())
            return Usage(0, 0, 0)
