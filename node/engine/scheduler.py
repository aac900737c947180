"""Which of the waiting inputs run in this step: decode first, then prefill chunks under the token budget.

Pure: it takes from sessions and knows neither torch nor links, only whether a next hop has room for bulk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from node.engine.session import Input, StageSession


@dataclass(frozen=True, slots=True)
class StepLimits:
    max_num_decode_sessions: int = 256
    max_num_prefill_tokens: int = 256


@dataclass(frozen=True, slots=True)
class Slice:
    """One session's part of a step."""

    session: StageSession
    input: Input

    @property
    def num_tokens(self) -> int:
        return len(self.input.data)

    @property
    def end(self) -> int:
        return self.input.position + self.num_tokens


def schedule(
    sessions: Iterable[StageSession], limits: StepLimits, can_send_bulk: Callable[[bytes], bool]
) -> list[Slice]:
    """`sessions` in the order they became ready. Empty when all that waits, waits for room at a next hop."""
    ready = list(sessions)
    decodes = [session for session in ready if session.is_decode_next][: limits.max_num_decode_sessions]
    batch = [Slice(session, session.take(1)) for session in decodes]
    num_left = limits.max_num_prefill_tokens
    for session in ready:
        if num_left == 0:
            break
        if session.is_prefill_next and (session.is_last_stage or can_send_bulk(session.next_node)):
            batch.append(Slice(session, session.take(num_left)))
            num_left -= batch[-1].num_tokens
    return batch
