"""A request as its gateway sees it: tokens as they come, one ending, whatever happens to the stages.

Keeps every token so far. When an attempt is preempted or a stage is lost, the next one replays them: the
client sees a pause. Opening attempts and the books are `head.py`'s business.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

from node.gateway.backend import GeneratedToken, GenerationFailed, NoRoute, Usage
from node.links.frames import ErrorCode, StageTiming
from node.sessions.attempt import Attempt, AttemptLost

# How often one request may lose a stage. Preemptions are bounded by the deadline alone.
MAX_NUM_FAILOVERS = 4
_FAILOVER = frozenset({ErrorCode.NEXT_HOP_UNREACHABLE, ErrorCode.SHUTTING_DOWN})

Replay = Callable[[tuple[int, ...], bytes | None], Awaitable[Attempt]]
"""`replay(token_ids, suspect)`: another attempt, after these tokens and without that node. Raises NoRoute."""

End = Callable[[Attempt, int, bool], "asyncio.Future[Usage]"]
"""`end(attempt, num_output_tokens, failed)`: settle or void it; goes on by itself even if nobody waits."""


class HeadSession:
    """`tokens` once, `settle` once; whatever is cancelled, `settle` ends the session at every stage."""

    def __init__(self, attempt: Attempt, replay: Replay, end: End, on_end: Callable[[], None]) -> None:
        """`terms` are the first attempt's, for good."""
        self.terms = attempt.terms
        self.token_ids: list[int] = []
        # Raised by whoever writes to the client; receipts follow it.
        self.num_delivered = 0
        self.failed = False
        self.num_attempts = 1
        self.began_s = time.monotonic()
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self._attempt: Attempt | None = attempt
        self._last_attempt = attempt
        self._replay = replay
        self._end = end
        self._on_end = on_end
        self._num_failovers = 0
        self._num_tokens_before = 0
        self._earlier: list[asyncio.Future[Usage]] = []

    @property
    def timings(self) -> dict[int, StageTiming]:
        """Of the last attempt, by stage index, as far as they have come."""
        return self._last_attempt.timings

    async def tokens(self) -> AsyncGenerator[GeneratedToken, None]:
        """Until a finish reason. Raises GenerationFailed when a stage gives out and no other takes over."""
        while self._attempt is not None and not self._attempt.is_finished:
            try:
                tokens = await self._attempt.next_tokens()
            except AttemptLost as lost:
                await self._go_on(self._attempt, lost)
                continue
            if tokens:
                self.last_token_s = time.monotonic()
                self.first_token_s = self.first_token_s or self.last_token_s
                self.token_ids += [token.token_id for token in tokens]
            for token in tokens:
                yield token
            # Whoever asks for more has done with these.
            self._attempt.sign_delivered(self.num_delivered - self._num_tokens_before)

    async def _go_on(self, attempt: Attempt, lost: AttemptLost) -> None:
        """End the attempt at what it gave, and open another for the rest."""
        if lost.code is not ErrorCode.PREEMPTED:
            self._num_failovers += 1
            if lost.code not in _FAILOVER or self._num_failovers > MAX_NUM_FAILOVERS:
                self.failed = True
                raise GenerationFailed(str(lost)) from None
        # At once, for its KV may be the very room that the next one waits for.
        attempt.stop(attempt.num_tokens)
        self.num_attempts += 1
        try:
            following = await self._replay(tuple(self.token_ids), lost.suspect)
        except NoRoute as problem:
            self.failed = True
            raise GenerationFailed(f"{lost}; {problem}") from None
        self._earlier.append(self._end(attempt, attempt.num_tokens, False))
        self._num_tokens_before = len(self.token_ids)
        self._attempt = self._last_attempt = following

    async def settle(self, num_output_tokens: int) -> Usage:
        """End the session: settled at `num_output_tokens` or what is signed for; voided when that is 0.

        What earlier attempts gave is settled already: only the last is shortened or voided.
        """
        num_left = min(num_output_tokens, len(self.token_ids)) - self._num_tokens_before
        endings = list(self._earlier)
        if self._attempt is not None:
            endings.append(self._end(self._attempt, max(0, num_left), self.failed))
            self._attempt = None
        self._on_end()
        usages = await asyncio.gather(*(asyncio.shield(ending) for ending in endings))
        return Usage(
            sum(usage.num_prompt_tokens for usage in usages),
            sum(usage.num_cached_tokens for usage in usages),
            sum(usage.num_output_tokens for usage in usages),
        )

    @property
    def tokens_per_s(self) -> float | None:
        """Decode speed after the first token; None before there are two."""
        if self.first_token_s is None or self.last_token_s is None or len(self.token_ids) < 2:
            return None
        return (len(self.token_ids) - 1) / max(self.last_token_s - self.first_token_s, 1e-9)
