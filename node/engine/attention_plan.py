"""Which tokens of a step attend in one call, and the slots and masks of it; made once for all layers.

Short inputs of several sessions run together, grouped by length so that padding is bounded. A prefill chunk
runs alone; on a CPU so does a longer session whose blocks are neighbours, read in place. B sessions of a
part, N rows of each, C blocks, L length attended to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from node.engine.kv_cache import BLOCK_TOKENS, BlockTable

MAX_NUM_GROUPED_ROWS = 16
MAX_PADDING = 2
# From here on, copying a session's KV into the group costs more than a call of its own (measured, CPU).
MIN_TOKENS_IN_PLACE = 128


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one session inside the packed row; the first stands at `position`.

    The first `num_prompt_tokens` are of the prompt that was asked about: kernels may multiply those in
    another way than what came out, as long as they always do.
    """

    table: BlockTable
    position: int
    num_tokens: int
    num_prompt_tokens: int = 0

    @property
    def end(self) -> int:
        return self.position + self.num_tokens


@dataclass(frozen=True, slots=True)
class Part:
    """Sessions that attend in one call: which rows ask, which slots answer, and what is hidden from whom.

    `rows` are B x N rows of the packed row; a session with fewer than N has its last one repeated. `slots`
    are B x L, or the first and the number of one run that is read in place.
    """

    num_sessions: int
    num_rows: int
    rows: Tensor | slice
    slots: Tensor | tuple[int, int]
    mask_B1NL: Tensor | None

    @property
    def is_chunk(self) -> bool:
        return self.num_rows > MAX_NUM_GROUPED_ROWS


@dataclass(frozen=True, slots=True)
class Plan:
    """`order` says where each row of the packed row stands in the parts' outputs, None: as they come."""

    parts: list[Part]
    order: Tensor | None


def make_plan(spans: Sequence[Span], window: int | None, device: torch.device, dtype: torch.dtype) -> Plan:
    """For rows of `dtype`. `window`: a token sees no further back than so many tokens, itself included."""
    alone, groups = _split(spans, window, device)
    parts = [_part_of_one(asking, window, device, dtype) for asking in alone]
    parts += [_part_of_group(group, window, device, dtype) for group in groups]
    rows = [row for asking in alone for row in asking.rows(asking.span.num_tokens)]
    rows += [row for group in groups for row in _group_rows(group)]
    return Plan(parts, _order(rows, device))


def written_slots(spans: Sequence[Span], device: torch.device) -> Tensor | tuple[int, int]:
    """Of all tokens in the packed row; first and number if they are neighbours."""
    slots = [slot for span in spans for slot in _slots(span.table.blocks, span.position, span.end)]
    if slots == list(range(slots[0], slots[0] + len(slots))):
        return slots[0], len(slots)
    return torch.tensor(slots, device=device)


def _slots(blocks: Sequence[int], start: int, end: int) -> Iterator[int]:
    for position in range(start, end):
        yield blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class _Asking:
    """A span with the row it begins at, and the first token any of its rows sees."""

    span: Span
    row: int
    first: int

    @property
    def length(self) -> int:
        return self.span.end - self.first

    def rows(self, num_rows: int) -> list[int]:
        """Where its tokens stand in the packed row, the last one repeated."""
        return [self.row + min(step, self.span.num_tokens - 1) for step in range(num_rows)]

    def run(self) -> tuple[int, int] | None:
        """First and number of the slots attended to, if they are neighbours."""
        blocks = self.span.table.blocks[self.first // BLOCK_TOKENS : -(-self.span.end // BLOCK_TOKENS)]
        if list(blocks) != list(range(blocks[0], blocks[0] + len(blocks))):
            return None
        start = blocks[0] * BLOCK_TOKENS + self.first % BLOCK_TOKENS
        return start, self.length


def _split(
    spans: Sequence[Span], window: int | None, device: torch.device
) -> tuple[list[_Asking], list[list[_Asking]]]:
    """Who attends alone, and who together."""
    alone: list[_Asking] = []
    short: list[_Asking] = []
    row = 0
    for span in spans:
        first = 0 if window is None else max(0, span.position - window + 1)
        asking = _Asking(span, row, first)
        row += span.num_tokens
        is_chunk = span.num_tokens > MAX_NUM_GROUPED_ROWS
        is_long = device.type == "cpu" and asking.length >= MIN_TOKENS_IN_PLACE
        is_alone = is_chunk or len(spans) == 1 or (is_long and asking.run() is not None)
        (alone if is_alone else short).append(asking)
    return alone, list(_groups(short))


def _order(rows: list[int], device: torch.device) -> Tensor | None:
    if rows == list(range(len(rows))):
        return None
    # The repeated rows of one token are all alike: any of them will do.
    places = {row: place for place, row in enumerate(rows)}
    return torch.tensor([places[row] for row in range(len(places))], device=device)


def _groups(short: list[_Asking]) -> Iterator[list[_Asking]]:
    """Of like length and number of rows, so that padding costs no more than what it saves. In order of
    their rows, if it is one group."""
    group: list[_Asking] = []
    for asking in sorted(short, key=lambda each: (_num_padded_rows(each), each.length)):
        if group and (
            _num_padded_rows(asking) != _num_padded_rows(group[0])
            or asking.length > MAX_PADDING * group[0].length + BLOCK_TOKENS
        ):
            yield sorted(group, key=lambda each: each.row)
            group = []
        group.append(asking)
    if group:
        yield sorted(group, key=lambda each: each.row)


def _num_padded_rows(asking: _Asking) -> int:
    """The next power of two."""
    return 1 << (asking.span.num_tokens - 1).bit_length()


def _part_of_one(asking: _Asking, window: int | None, device: torch.device, dtype: torch.dtype) -> Part:
    span = asking.span
    slots: Tensor | tuple[int, int] | None = asking.run()
    if slots is None:
        slots = span.table.slots(asking.first, span.end)
    mask_B1NL = None
    if span.num_tokens > 1:
        positions_BN = torch.arange(span.position, span.end, device=device)[None]
        mask_B1NL = _mask(
            positions_BN, torch.tensor([[asking.first]], device=device), asking.length, window, dtype
        )
    rows = slice(asking.row, asking.row + span.num_tokens)
    return Part(1, span.num_tokens, rows, slots, mask_B1NL)


def _group_rows(group: list[_Asking]) -> list[int]:
    num_rows = max(asking.span.num_tokens for asking in group)
    return [row for asking in group for row in asking.rows(num_rows)]


def _part_of_group(
    group: list[_Asking], window: int | None, device: torch.device, dtype: torch.dtype
) -> Part:
    num_rows = max(asking.span.num_tokens for asking in group)
    length = max(asking.length for asking in group)
    num_blocks = max(-(-asking.span.end // BLOCK_TOKENS) for asking in group)
    blocks_BC = torch.tensor(
        [_padded(asking.span.table.blocks, num_blocks) for asking in group], device=device
    )
    numbers = [(each.first, each.span.position, each.span.end - 1) for each in group]
    first_B1, position_B1, last_B1 = torch.tensor(numbers, device=device).T[..., None]
    positions_BN = (position_B1 + torch.arange(num_rows, device=device)).minimum(last_B1)
    # Padding repeats the last token: never a slot that was not written, whose NaN would pass any mask.
    seen_BL = (first_B1 + torch.arange(length, device=device)).minimum(last_B1)
    slots_BL = blocks_BC.gather(1, seen_BL // BLOCK_TOKENS) * BLOCK_TOKENS + seen_BL % BLOCK_TOKENS
    is_even = num_rows == 1 and all(asking.length == length for asking in group)
    mask_B1NL = None if is_even else _mask(positions_BN, first_B1, length, window, dtype)
    rows = torch.tensor(_group_rows(group), device=device)
    return Part(len(group), num_rows, rows, slots_BL.flatten(), mask_B1NL)


def _padded(blocks: Sequence[int], num_blocks: int) -> list[int]:
    return [*blocks[:num_blocks], *[0] * (num_blocks - len(blocks))]


def _mask(
    positions_BN: Tensor, first_B1: Tensor, length: int, window: int | None, dtype: torch.dtype
) -> Tensor:
    """0 where the row at a position sees a token, minus infinity where not; `[B, 1, N, L]`."""
    seen_B1L = (first_B1 + torch.arange(length, device=positions_BN.device))[:, None]
    hidden_BNL = seen_B1L > positions_BN[..., None]
    if window is not None:
        hidden_BNL |= seen_B1L <= positions_BN[..., None] - window
    # Of four dimensions: with three, torch takes its slow kernel without a word.
    return torch.zeros_like(hidden_BNL, dtype=dtype).masked_fill_(hidden_BNL, float("-inf"))[:, None]
