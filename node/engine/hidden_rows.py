"""Rows of hidden states as frames carry them: tensor memory both ways, in floats or in 8 bits.

Knows tensors and frames, no links and no sessions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from node.engine.int8_rows import dequantize_rows, quantize_rows, scales_of
from node.links.batches import num_row_bytes
from node.links.frames import Dtype, HiddenBatch, HiddenItem

AUTO_BITS = 0
# One way. A local network is below; beyond, the time to send a long prompt's rows is worth two conversions.
SLOW_LINK_US = 3000

DTYPES = {
    Dtype.FLOAT32: torch.float32,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT16: torch.float16,
    Dtype.INT8: torch.int8,
}
_FRAME_DTYPES = {dtype: name for name, dtype in DTYPES.items()}


def are_8_bits_due(hidden_bits: int, link_us: int) -> bool:
    """`hidden_bits` is 16 (as the layers compute), 8 or `AUTO_BITS`: 8 where the way is long."""
    return hidden_bits == 8 or (hidden_bits == AUTO_BITS and link_us >= SLOW_LINK_US)


def hidden_batch(items: Sequence[HiddenItem], rows: Sequence[Tensor], is_8_bits: bool) -> HiddenBatch:
    """The rows leave as they lie in memory: a copy only when they lie apart, or to make them small. Rows that
    8 bits cannot say travel as they are.
    """
    rows_TD = rows[0] if len(rows) == 1 else torch.cat(list(rows))
    hidden_size = rows_TD.shape[1]
    if is_8_bits and (small_TB := quantize_rows(rows_TD)) is not None:
        rows_TD = small_TB
    raw = rows_TD.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(-1)
    return HiddenBatch(tuple(items), _FRAME_DTYPES[rows_TD.dtype], hidden_size, raw.data)


def rows_tensor(frame: HiddenBatch) -> Tensor:
    """`[tokens, hidden_size]`, or of 8-bit rows `[tokens, bytes of a row]`, which `floats` reads when they
    are due: over the frame's own memory, which lives, and counts as held, as long as the tensor.
    """
    rows = frame.rows
    writable = memoryview(rows) if not memoryview(rows).readonly else bytearray(rows)
    width = frame.hidden_size
    if frame.dtype is Dtype.INT8:
        width = num_row_bytes(frame.dtype, width)
    return torch.frombuffer(writable, dtype=DTYPES[frame.dtype]).reshape(-1, width)


def floats(rows: Tensor, hidden_size: int) -> Tensor:
    """What `rows_tensor` gave, as `[tokens, hidden_size]` of a float type."""
    return dequantize_rows(rows, hidden_size) if rows.dtype is torch.int8 else rows


def are_finite(rows: Tensor, hidden_size: int) -> bool:
    """Whether these rows, as `rows_tensor` gave them, hold numbers only. One pass when they do."""
    values = scales_of(rows, hidden_size) if rows.dtype is torch.int8 else rows
    # A sum is spoiled by whatever is not finite; one that is too large says nothing yet.
    return math.isfinite(values.sum(dtype=torch.float32)) or bool(torch.isfinite(values).all())
