"""One pass of a group's slices through its layers: ids or rows in, rows out, keys and values in the cache.

What arrived in one frame and runs in the same order is used as it lies in memory. Knows no links.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from node.engine.attention import PagedStep, Span
from node.engine.group import Group
from node.engine.hidden_rows import floats
from node.engine.session import Slice


def run_layers(group: Group, parts: Sequence[Slice]) -> Tensor:
    """`[T, D]`: a row for each token of `parts`, in order."""
    loaded = group.loaded
    shard = loaded.shard
    positions: list[int] = []
    spans: list[Span] = []
    for part in parts:
        if part.num_tokens == 1:
            positions.append(part.position)
        else:
            positions.extend(range(part.position, part.end))
        num_prompt_tokens = min(max(0, part.session.num_own_prompt_tokens - part.position), part.num_tokens)
        spans.append(Span(part.session.table, part.position, part.num_tokens, num_prompt_tokens))
    if group.start_layer == 0:
        hidden_TD = shard.embed(torch.tensor(_ids(parts), device=shard.device))
    else:
        hidden_TD = _rows(parts, loaded.manifest.hidden_size).to(shard.device, shard.dtype)
    return shard.run(
        hidden_TD,
        torch.tensor(positions, device=shard.device),
        PagedStep(loaded.cache, spans),
        group.start_layer,
        group.end_layer,
    )


def _ids(parts: Sequence[Slice]) -> list[int]:
    ids: list[int] = []
    for part in parts:
        assert not isinstance(part.source, Tensor)
        ids.extend(part.source[part.row : part.row + part.num_tokens])
    return ids


def _rows(parts: Sequence[Slice], hidden_size: int) -> Tensor:
    """A view where all rows stand one after another in one frame, else a copy."""
    pieces: list[Tensor] = []
    source, start, end = parts[0].source, parts[0].row, parts[0].row
    for part in parts:
        if part.source is not source or part.row != end:
            pieces.append(_piece(source, start, end, hidden_size))
            source, start = part.source, part.row
        end = part.row + part.num_tokens
    pieces.append(_piece(source, start, end, hidden_size))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _piece(source: Sequence[int] | Tensor, start: int, end: int, hidden_size: int) -> Tensor:
    assert isinstance(source, Tensor)
    return floats(source if start == 0 and end == len(source) else source[start:end], hidden_size)
