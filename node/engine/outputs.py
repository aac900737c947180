"""What comes out of a pass: rows for the next stage or, at the last one, tokens of each session.

A token is picked after each session's first row; after the row of a guess only if the guess is what was just
picked. So the tokens are those that one row at a time would give. Which token is `sampling.py`'s business;
frames are made in the outbox.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from node.engine.group import Group
from node.engine.outbox import Outbox
from node.engine.sampling import Draw, Pick, Sampler, finish_reason
from node.engine.session import Slice, StageSession
from node.links.frames import FinishReason, HiddenItem, Lane, TokenItem

Feed = Callable[[StageSession, int, Sequence[int]], None]
"""`feed(session, position, token_ids)`: what was picked for a session that is here alone."""


@dataclass(slots=True)
class _Picking:
    """The row whose token is picked next, the `number`th that is of this session; what was picked so far."""

    part: Slice
    row: int
    number: int = 0
    items: list[TokenItem] = field(default_factory=list)

    def draw(self) -> Draw:
        session = self.part.session
        position = self.part.end - len(self.part.draft_ids) + self.number
        return Draw(
            session.opening.sampling, position, position - session.num_own_prompt_tokens, session.edits
        )

    def take(self, draw: Draw, pick: Pick) -> bool:
        """Whether the next row counts: it is of the token that was picked, and that was not the last."""
        session, token_id = self.part.session, pick.token_id
        reason = finish_reason(token_id, draw)
        if session.edits is not None:
            session.edits.add(token_id)
        self.items.append(
            TokenItem(session.id, draw.position, token_id, reason, pick.logprob, pick.top_logprobs)
        )
        session.is_finished = reason is not FinishReason.NONE
        draft_ids, number = self.part.draft_ids, self.number
        self.row, self.number = self.row + 1, number + 1
        return not session.is_finished and number < len(draft_ids) and draft_ids[number] == token_id


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
            items.append(HiddenItem(session.id, part.position, part.num_tokens, part.draft_ids))
            row += part.num_tokens
        self._outbox.add_hidden(node, lane, items, hidden_TD[first:] if first else hidden_TD)

    def _sample(self, group: Group, parts: Sequence[Slice], hidden_TD: Tensor) -> list[StageSession]:
        """Tokens for each session whose prompt is complete; the others only filled their KV."""
        rows: list[int] = []
        pickings: list[_Picking] = []
        row = 0
        for part in parts:
            row += part.num_tokens
            if part.end >= part.session.num_prompt_tokens:
                pickings.append(_Picking(part, len(rows)))
                rows.extend(range(row - 1 - len(part.draft_ids), row))
        if not pickings:
            return []
        logits_BV = group.loaded.shard.logits(hidden_TD if len(rows) == len(hidden_TD) else hidden_TD[rows])
        broken: list[StageSession] = []
        while pickings:
            pickings = self._pick(pickings, logits_BV, broken)
        return broken

    def _pick(
        self, pickings: list[_Picking], logits_BV: Tensor, broken: list[StageSession]
    ) -> list[_Picking]:
        """One token each; who goes on to its next row."""
        draws = [picking.draw() for picking in pickings]
        if len(pickings) < len(logits_BV):
            logits_BV = logits_BV[[picking.row for picking in pickings]]
        going_on: list[_Picking] = []
        for picking, draw, pick in zip(pickings, draws, self._sampler.sample(logits_BV, draws), strict=True):
            if pick is None:
                broken.append(picking.part.session)
            elif picking.take(draw, pick):
                going_on.append(picking)
            else:
                self._tell(picking.part.session, picking.items)
        return going_on

    def _tell(self, session: StageSession, items: Sequence[TokenItem]) -> None:
        is_alone = session.is_first_stage
        goes_on = not session.is_finished
        first_stage = session.next_node if goes_on and not is_alone else None
        for item in items:
            self._outbox.add_token(session.head, first_stage, item)
        if goes_on and is_alone:
            self._feed(session, items[0].position, [item.token_id for item in items])


def account(parts: Sequence[Slice], started_s: float) -> None:
    """What a pass that began at `started_s` did for each session."""
    compute_s = time.perf_counter() - started_s
    num_decodes = num_prefill_tokens = num_drafts = 0
    for part in parts:
        session = part.session
        session.meter.count(part.position, part.num_tokens, len(part.draft_ids))
        session.num_steps += 1
        session.compute_s += compute_s
        session.queue_s += max(0.0, started_s - part.arrived_s)
        if part.position < session.num_prompt_tokens:
            num_prefill_tokens += part.num_tokens
            session.cache_prompt_blocks(part.end)
        else:
            num_decodes += 1
            num_drafts += len(part.draft_ids)
            if session.speculation is not None and not session.is_last_stage:
                session.speculation.pass_began(started_s)
    parts[0].session.group.pace.learn(num_decodes, num_prefill_tokens, compute_s, num_drafts)
