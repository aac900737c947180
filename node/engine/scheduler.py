"""Which of the waiting inputs run in this step: decode first, then prefill chunks under the token budget.

Beside decodes a chunk is no longer than what takes a good half as long as the decodes themselves, so that a
prompt never stalls the streams of others. Pure: it takes from sessions and knows neither torch nor links,
only whether a next hop has room for bulk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from node.engine.group import Group
from node.engine.session import Slice, StageSession

# With as much prefill as decoding, the longest gaps of a measured run were beyond three calm ones.
PREFILL_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class StepLimits:
    """A guess takes a session's place among the decodes. Beside those, a step takes at least
    `min_num_prefill_tokens`, however long they take.
    """

    max_num_decode_sessions: int = 256
    max_num_prefill_tokens: int = 256
    min_num_prefill_tokens: int = 8


Rank = Callable[[StageSession], tuple[int, int]]


def schedule(
    ready: Iterable[StageSession],
    groups: Iterable[Group],
    limits: StepLimits,
    can_send_bulk: Callable[[bytes], bool],
    rank: Rank | None = None,
) -> list[Slice]:
    """`ready` in the order they became so: who has just run comes last, so that all take turns. With `rank`
    those of the lowest come first, and take turns among themselves.

    At most one slice per session, decodes first. Empty when all that waits, waits for room at a next hop.
    """
    if rank is not None:
        ready = sorted(ready, key=rank)
    batch: list[Slice] = []
    num_decode_rows = 0
    prefilling: list[StageSession] = []
    num_left: dict[Group, int] = {}
    for session in ready:
        if session.waiting[0].position < session.num_prompt_tokens:
            prefilling.append(session)
            continue
        group = session.group
        num = num_left.get(group, -1)
        if num < 0:
            num = group.max_num_decodes
        if num > 0 and num_decode_rows < limits.max_num_decode_sessions:
            num -= 1
            part = session.waiting.popleft()
            num_decode_rows += part.num_tokens
            batch.append(part)
        num_left[group] = num
    if prefilling:
        _add_prefill(batch, prefilling, seconds_beside_decodes(groups), limits, can_send_bulk)
    return batch


def seconds_beside_decodes(groups: Iterable[Group]) -> float | None:
    """How long prefill may take in one step: a share of the decodes of a step, here now or on their way.

    None: nothing decodes.
    """
    decode_s = [group.pace.decode_s(group.max_num_decodes) for group in groups if group.num_decoding]
    return PREFILL_SHARE * sum(decode_s) if decode_s else None


def _add_prefill(
    batch: list[Slice],
    prefilling: Iterable[StageSession],
    seconds: float | None,
    limits: StepLimits,
    can_send_bulk: Callable[[bytes], bool],
) -> None:
    num_left, num_due = limits.max_num_prefill_tokens, limits.min_num_prefill_tokens
    for session in prefilling:
        num_tokens = num_left
        if seconds is not None:
            per_token_s = session.group.pace.prefill_s_per_token
            num_tokens = min(num_left, max(num_due, int(seconds / per_token_s)))
        if num_tokens <= 0:
            break
        if session.is_last_stage or can_send_bulk(session.next_node):
            part = session.take(num_tokens)
            batch.append(part)
            num_left -= part.num_tokens
            num_due -= part.num_tokens
            if seconds is not None:
                seconds -= part.num_tokens * per_token_s
