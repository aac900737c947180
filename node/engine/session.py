"""One session as one stage sees it: its place in the route, its KV room, and what has yet to run.

Input is taken in order only: a frame for any other position is the sender's mistake. Knows no links.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from node.engine.group import Group
from node.engine.kv_cache import BLOCK_TOKENS, BlockTable
from node.engine.loaded import LoadedShard
from node.engine.meter import Meter
from node.engine.sampling_edits import LogitEdits
from node.engine.speculation import PassCosts, Speculation
from node.engine.turns import Claim
from node.links.frames import OpenSession, Stage

# A row beside other sessions' must earn twice what it delays them: it saves mostly one such row later, for
# they go on, and rows get dearer in jumps.
SHARED_ROW_PRICE = 2


class BadFrame(Exception):
    """A peer sent what this session cannot take; the message is one line."""


@dataclass(slots=True, eq=False)
class Slice:
    """Rows `[row, row + num_tokens)` of `source`, the first for `position`: input that waits, or runs.

    `source` holds token ids at the first stage; at the others it is the `[rows, hidden_size]` of a whole
    frame, so that what arrived together and runs together is never copied. The last rows are of `draft_ids`,
    guesses that the row before each may or may not bear out.
    """

    session: StageSession
    position: int
    num_tokens: int
    source: Sequence[int] | Tensor
    row: int
    arrived_s: float
    draft_ids: tuple[int, ...] = ()
    end: int = field(init=False)

    def __post_init__(self) -> None:
        self.end = self.position + self.num_tokens


@dataclass(slots=True, eq=False)
class StageSession:
    """Over at `end_ms`, and at `deadline_ms` unless something happens; `prompt_ids` until the start.

    `number` tells younger sessions (higher) from older ones. `num_cached_tokens` rows of KV were here when it
    opened. `is_paused`: its head has to sign first. `is_set_aside`: it has no KV and waits to be closed.
    `draft_ids` are those of the last input: the next may begin at any of their rows, not before them. `claim`
    is what it came in on; the costs are what its tokens move its payer's counter by.
    """

    opening: OpenSession
    loaded: LoadedShard
    group: Group
    table: BlockTable
    meter: Meter
    end_ms: int
    prompt_ids: array[int]
    scope: bytes
    num_cached_tokens: int
    number: int
    deadline_ms: int = 0
    next_position: int = 0
    num_hashed_blocks: int = 0
    has_begun: bool = False
    is_decoding: bool = False
    is_paused: bool = False
    is_finished: bool = False
    is_set_aside: bool = False
    num_steps: int = 0
    compute_s: float = 0.0
    queue_s: float = 0.0
    edits: LogitEdits | None = None
    draft_ids: tuple[int, ...] = ()
    speculation: Speculation | None = None
    claim: Claim = Claim.SHARE
    cost_per_prompt_token: int = 1
    cost_per_output_token: int = 1
    waiting: deque[Slice] = field(default_factory=deque)
    # What every step asks for, looked up once.
    id: bytes = field(init=False)
    head: bytes = field(init=False)
    payer: bytes = field(init=False)
    num_prompt_tokens: int = field(init=False)
    num_own_prompt_tokens: int = field(init=False)
    max_num_tokens: int = field(init=False)
    is_first_stage: bool = field(init=False)
    is_last_stage: bool = field(init=False)
    next_stage: Stage = field(init=False)
    next_node: bytes = field(init=False)
    previous_node: bytes = field(init=False)

    def __post_init__(self) -> None:
        opening = self.opening
        route, index = opening.route, opening.stage_index
        self.id = opening.session
        self.head = opening.head
        self.payer = opening.payer
        self.num_prompt_tokens = opening.num_prompt_tokens
        self.num_own_prompt_tokens = num_own_prompt_tokens(opening)
        self.max_num_tokens = max_num_tokens(opening)
        self.is_first_stage = index == 0
        self.is_last_stage = index == len(route) - 1
        # Where this stage's output goes: hidden states to the next stage, tokens back to the first.
        self.next_stage = route[(index + 1) % len(route)]
        self.next_node = self.next_stage.node
        self.previous_node = route[index - 1].node

    def begin(self, num_cached_tokens: int) -> None:
        """The first input stands at `num_cached_tokens`: what is before it need not run. Raises BadFrame.

        That may be less than is cached here, when another stage has less: those rows are written again, and
        never into blocks that others may be using.
        """
        if num_cached_tokens > self.num_cached_tokens or num_cached_tokens % BLOCK_TOKENS:
            raise BadFrame(f"{num_cached_tokens} tokens are not what is cached here")
        if num_cached_tokens < self.num_cached_tokens:
            num_tokens, cache = self.table.num_tokens, self.loaded.cache
            cache.truncate(self.table, num_cached_tokens)
            # If that is no longer to be had, room is made when the rows run.
            cache.grow(self.table, num_tokens)
        self.has_begun = True
        self.next_position = num_cached_tokens
        self.num_hashed_blocks = num_cached_tokens // BLOCK_TOKENS
        self.meter.begin(num_cached_tokens)

    def push(
        self,
        position: int,
        num_tokens: int,
        source: Sequence[int] | Tensor,
        row: int,
        arrived_s: float,
        draft_ids: tuple[int, ...] = (),
    ) -> None:
        """Raises BadFrame unless the input continues where the last one ended, within the limits.

        It ended after as many of its guesses as came true, which a later stage learns from this position.
        """
        if not self.has_begun:
            self.begin(position)
        end = position + num_tokens
        latest = self.next_position
        if not latest - len(self.draft_ids) <= position <= latest or self.is_finished:
            raise BadFrame(f"position {position} came where {latest} was due")
        if end > self.max_num_tokens or (end > self.num_prompt_tokens and num_tokens > 1 + len(draft_ids)):
            raise BadFrame(f"{num_tokens} tokens from position {position} do not fit the session")
        if draft_ids:
            self._check_drafts(position, num_tokens, draft_ids)
        self.next_position = end
        self.draft_ids = draft_ids
        self.waiting.append(Slice(self, position, num_tokens, source, row, arrived_s, draft_ids))

    def _check_drafts(self, position: int, num_tokens: int, draft_ids: tuple[int, ...]) -> None:
        if len(draft_ids) > self.opening.max_num_draft_tokens:
            raise BadFrame(f"{len(draft_ids)} guesses are more than the session was opened for")
        if position < self.num_prompt_tokens or num_tokens != 1 + len(draft_ids):
            raise BadFrame("guesses stand behind one token of the output")
        if max(draft_ids) >= self.loaded.manifest.vocab_size:
            raise BadFrame("a guess is outside the vocabulary")

    def confirm(self, position: int, token_ids: Sequence[int]) -> None:
        """At the first stage: the tokens from `position` on were picked. Raises BadFrame if they cannot be.

        All but the last are guesses of the last input that came true.
        """
        due = self.next_position - len(self.draft_ids)
        if position != due or not self.has_begun:
            raise BadFrame(f"a token for position {position} came where {due} was due")
        num_accepted = len(token_ids) - 1
        if num_accepted > len(self.draft_ids) or tuple(token_ids[:-1]) != self.draft_ids[:num_accepted]:
            raise BadFrame("tokens came for which there were other guesses, or none")
        vocab_size = self.loaded.manifest.vocab_size
        if not all(0 <= token_id < vocab_size for token_id in token_ids):
            raise BadFrame("that token cannot be")

    # What the first stage needs to guess.

    def speculate_after(self, prompt_ids: Sequence[int]) -> None:
        max_num_drafts = self.opening.max_num_draft_tokens
        if max_num_drafts:
            self.speculation = Speculation(prompt_ids, self.max_num_tokens, max_num_drafts)

    def num_spare_rows(self, position: int) -> int:
        """Behind the row for `position`, without anybody being preempted for them."""
        num_blocks = len(self.table.blocks) + min(1, self.loaded.cache.pool.num_free_blocks)
        return max(0, num_blocks * BLOCK_TOKENS - position - 1)

    def pass_costs(self) -> PassCosts:
        """All stages are taken to be as fast as this one: for a row and, until one was timed, for a pass."""
        group = self.group
        share = (group.end_layer - group.start_layer) / self.loaded.manifest.num_layers
        # Those whose prompts still run will soon share the steps, and wait for them now.
        num_sharing = -(-group.num_sessions // group.num_stages)
        pass_s = group.pace.decode_s(num_sharing)
        if not self.is_last_stage:
            assert self.speculation is not None
            pass_s = self.speculation.round_s or pass_s / share
        price = 1 if num_sharing <= 1 else SHARED_ROW_PRICE * num_sharing
        return PassCosts(pass_s, group.pace.row_s / share * price)

    def take(self, num_tokens: int) -> Slice:
        """At most `num_tokens` of the input that is due; the rest stays."""
        first = self.waiting.popleft()
        if first.num_tokens <= num_tokens:
            return first
        rest = first.num_tokens - num_tokens
        source, row, arrived_s = first.source, first.row, first.arrived_s
        self.waiting.appendleft(
            # It waits for the chunk before it, which is no queue.
            Slice(self, first.position + num_tokens, rest, source, row + num_tokens, math.inf)
        )
        return Slice(self, first.position, num_tokens, source, row, arrived_s)

    def set_aside(self) -> None:
        """Nothing more is computed, and its KV is free; what it did so far can still be signed for."""
        self.is_set_aside = True
        self.loaded.cache.close(self.table)

    def cache_prompt_blocks(self, end: int) -> None:
        """The rows before `end` are in the KV: full blocks of the prompt may be found by later sessions.

        Not those with replayed output: a prompt's rows may be computed in another way.
        """
        hashes, blocks = self.opening.prefix_hashes, self.table.blocks
        num_full_blocks = min(min(end, self.num_own_prompt_tokens) // BLOCK_TOKENS, len(hashes))
        for index in range(self.num_hashed_blocks, num_full_blocks):
            self.loaded.cache.prefixes.add(self.scope, hashes[index], blocks[index])
        self.num_hashed_blocks = max(self.num_hashed_blocks, num_full_blocks)


def num_own_prompt_tokens(opening: OpenSession) -> int:
    """Without the output that a replay has at the end of its prompt."""
    return opening.num_prompt_tokens - opening.num_output_tokens_before


def max_num_tokens(opening: OpenSession) -> int:
    """KV room a session can come to need: its prompt and what is left of its output."""
    num_left = opening.sampling.max_num_output_tokens - opening.num_output_tokens_before
    return opening.num_prompt_tokens + max(0, num_left)
