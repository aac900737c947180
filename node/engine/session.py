"""One session as one stage sees it: its place in the route, its KV room, and what has yet to run.

Input is taken in order only: a frame for any other position is the sender's mistake. Knows no links.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

from node.engine.kv_cache import BlockTable
from node.engine.loaded import LoadedShard
from node.engine.meter import Meter
from node.links.frames import OpenSession, Stage


class BadFrame(Exception):
    """A peer sent what this session cannot take; the message is one line."""


@dataclass(frozen=True, slots=True)
class Input:
    """Token ids `[T]` at the first stage, rows `[T, hidden_size]` at the others, from `position` on."""

    position: int
    data: Tensor
    arrived_s: float


@dataclass(slots=True)
class StageSession:
    """Over at `end_ms`, and at `deadline_ms` unless something happens; `prompt_ids` until the start."""

    opening: OpenSession
    loaded: LoadedShard
    table: BlockTable
    meter: Meter
    end_ms: int
    prompt_ids: array[int]
    deadline_ms: int = 0
    next_position: int = 0
    is_started: bool = False
    is_finished: bool = False
    num_steps: int = 0
    compute_s: float = 0.0
    queue_s: float = 0.0
    waiting: deque[Input] = field(default_factory=deque)

    @property
    def id(self) -> bytes:
        return self.opening.session

    @property
    def stage(self) -> Stage:
        return self.opening.route[self.opening.stage_index]

    @property
    def is_first_stage(self) -> bool:
        return self.opening.stage_index == 0

    @property
    def is_last_stage(self) -> bool:
        return self.opening.stage_index == len(self.opening.route) - 1

    @property
    def next_stage(self) -> Stage:
        """Where this stage's output goes: hidden states to the next stage, tokens back to the first."""
        return self.opening.route[(self.opening.stage_index + 1) % len(self.opening.route)]

    @property
    def next_node(self) -> bytes:
        return self.next_stage.node

    @property
    def previous_node(self) -> bytes:
        return self.opening.route[self.opening.stage_index - 1].node

    @property
    def num_prompt_tokens(self) -> int:
        return self.opening.num_prompt_tokens

    @property
    def is_prefill_next(self) -> bool:
        return bool(self.waiting) and self.waiting[0].position < self.num_prompt_tokens

    @property
    def is_decode_next(self) -> bool:
        return bool(self.waiting) and self.waiting[0].position >= self.num_prompt_tokens

    def push(self, position: int, data: Tensor, arrived_s: float) -> None:
        """Raises BadFrame unless the input continues where the last one ended, within the reserved room."""
        end = position + len(data)
        if position != self.next_position or self.is_finished:
            raise BadFrame(f"position {position} came where {self.next_position} was due")
        if end > max_num_tokens(self.opening) or (end > self.num_prompt_tokens and len(data) > 1):
            raise BadFrame(f"{len(data)} tokens from position {position} do not fit the session")
        self.next_position = end
        self.waiting.append(Input(position, data, arrived_s))

    def take(self, max_num_tokens: int) -> Input:
        """At most `max_num_tokens` of the input that is due; the rest stays."""
        assert self.waiting
        first = self.waiting.popleft()
        if len(first.data) <= max_num_tokens:
            return first
        rest = first.data[max_num_tokens:]
        self.waiting.appendleft(Input(first.position + max_num_tokens, rest, first.arrived_s))
        return Input(first.position, first.data[:max_num_tokens], first.arrived_s)


def max_num_tokens(opening: OpenSession) -> int:
    """KV room a session can come to need: its prompt and what is left of its output."""
    num_left = opening.sampling.max_num_output_tokens - opening.num_output_tokens_before
    return opening.num_prompt_tokens + max(0, num_left)
