"""What comes out of a pass: rows for the next stage or, at the last one, a token per session.

Which token is `sampling.py`'s business; frames are made in the outbox.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from node.engine.group import Group
from node.engine.outbox import Outbox
from node.engine.sampling import Draw, Pick, Sampler, finish_reason
from node.engine.session import Slice, StageSession
from node.links.frames import FinishReason, HiddenItem, Lane, TokenItem

Feed = Callable[[StageSession, int, int], None]
"""`feed(session, position, token_id)`: the next input of a session that is here alone."""


class Outputs:
    def __init__(self, outbox: Outbox, feed: Feed) -> None:
        self._outbox = outbox
        self._feed = feed
        self._sampler = Sampler()

    def take(self, group: Group, parts: Sequence[Slice], hidden_TD: Tensor) -> list[StageSession]:
        """The sessions that got no token, because the model made nonsense for them."""
        if group.is_last:
            return self._sample(group, parts, hidden_TD)
        self._pass_on(parts, hidden_TD)
        return []

    def _pass_on(self, parts: Sequence[Slice], hidden_TD: Tensor) -> None:
        """Rows that go the same way stay together: mostly all decodes, then all chunks."""
        items: list[HiddenItem] = []
        node, lane, first, row = b"", Lane.DECODE, 0, 0
        for part in parts:
            session = part.session
            own_lane = Lane.BULK if part.position < session.num_prompt_tokens else Lane.DECODE
            if items and (own_lane is not lane or session.next_node != node):
                self._outbox.add_hidden(node, lane, items, hidden_TD[first:row])
                items, first = [], row
            node, lane = session.next_node, own_lane
            items.append(HiddenItem(session.id, part.position, part.num_tokens))
            row += part.num_tokens
        self._outbox.add_hidden(node, lane, items, hidden_TD[first:] if first else hidden_TD)

    def _sample(self, group: Group, parts: Sequence[Slice], hidden_TD: Tensor) -> list[StageSession]:
        """A token for each session whose prompt is complete; the others only filled their KV."""
        last_rows: list[int] = []
        sampled: list[Slice] = []
        row = -1
        for part in parts:
            row += part.num_tokens
            if part.end >= part.session.num_prompt_tokens:
                sampled.append(part)
                last_rows.append(row)
        if not sampled:
            return []
        hidden_BD = hidden_TD if len(sampled) == len(hidden_TD) else hidden_TD[last_rows]
        draws = [_draw(part) for part in sampled]
        logits_BV = group.loaded.shard.logits(hidden_BD)
        broken: list[StageSession] = []
        for part, draw, pick in zip(sampled, draws, self._sampler.sample(logits_BV, draws), strict=True):
            if pick is None:
                broken.append(part.session)
            else:
                self._token_picked(part.session, draw, pick)
        return broken

    def _token_picked(self, session: StageSession, draw: Draw, pick: Pick) -> None:
        token_id = pick.token_id
        reason = finish_reason(token_id, draw)
        if session.edits is not None:
            session.edits.add(token_id)
        item = TokenItem(session.id, draw.position, token_id, reason, pick.logprob, pick.top_logprobs)
        goes_on = reason is FinishReason.NONE
        is_alone = session.is_first_stage
        self._outbox.add_token(session.head, session.next_node if goes_on and not is_alone else None, item)
        if goes_on and is_alone:
            self._feed(session, draw.position, token_id)
        session.is_finished = not goes_on


def _draw(part: Slice) -> Draw:
    opening = part.session.opening
    num_own_prompt_tokens = opening.num_prompt_tokens - opening.num_output_tokens_before
    return Draw(opening.sampling, part.end, part.end - num_own_prompt_tokens, part.session.edits)


def account(parts: Sequence[Slice], started_s: float) -> None:
    """What a pass that began at `started_s` did for each session."""
    compute_s = time.perf_counter() - started_s
    num_decodes = num_prefill_tokens = 0
    for part in parts:
        session = part.session
        session.meter.count(part.position, part.num_tokens)
        session.num_steps += 1
        session.compute_s += compute_s
        session.queue_s += max(0.0, started_s - part.arrived_s)
        if part.position < session.num_prompt_tokens:
            num_prefill_tokens += part.num_tokens
            session.cache_prompt_blocks(part.end)
        else:
            num_decodes += 1
    parts[0].session.group.pace.learn(num_decodes, num_prefill_tokens, compute_s)
