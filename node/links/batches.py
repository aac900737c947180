"""The headers of the two frames of every step, in fixed fields: a token's cost is counted in microseconds.

    HiddenBatch  dtype u8 | hidden_size u32 | num_items u16
                 | num_items x (session 16 | position u32 | num_tokens u32 | num_draft_ids u8) | draft ids u32
    TokenBatch   num_items u16
                 | num_items x (session 16 | position u32 | token_id u32 | finish_reason u8 | num_top i8)
                 | for each item with num_top >= 0: logprob f64 | num_top x (token_id u32 | logprob f64)

All big-endian. What belongs to single items stands behind all of them, in their order; num_top -1 is a token
without logprobs. Every header has one encoding only. Knows no sockets and no sessions.
"""

from __future__ import annotations

import math
import struct

from node.links.fields import BatchError, FrameError
from node.links.frames import (
    MAX_NUM_DRAFT_TOKENS,
    MAX_NUM_TOP_LOGPROBS,
    SCALE_GROUP,
    SESSION_ID_BYTES,
    Dtype,
    FinishReason,
    HiddenBatch,
    HiddenItem,
    TokenBatch,
    TokenItem,
)

Buffer = bytes | bytearray | memoryview

MAX_NUM_ITEMS = 4096
MAX_HIDDEN_SIZE = 1 << 20
MAX_BATCH_HEADER_BYTES = 1 << 20
# What a logprob that is no number travels as; JSON has no words for it either.
LEAST_LOGPROB = -9999.0

_HIDDEN = struct.Struct("!BIH")
_HIDDEN_ITEM = struct.Struct("!16sIIB")
_ONE_HIDDEN = struct.Struct("!BIH16sIIB")
_TOKENS = struct.Struct("!H")
_TOKEN_ITEM = struct.Struct("!16sIIBb")
_LOGPROB = struct.Struct("!d")
_TOP_LOGPROB = struct.Struct("!Id")
_DRAFT_IDS = tuple(struct.Struct(f"!{num}I") for num in range(MAX_NUM_DRAFT_TOKENS + 1))
_DTYPES = tuple(Dtype)
_FINISH_REASONS = tuple(FinishReason)
_VALUE_BYTES = {Dtype.FLOAT32: 4, Dtype.BFLOAT16: 2, Dtype.FLOAT16: 2}


def num_row_bytes(dtype: Dtype, hidden_size: int) -> int:
    """What one row of hidden states takes."""
    if dtype is Dtype.INT8:
        return hidden_size + 2 * -(-hidden_size // SCALE_GROUP)
    return _VALUE_BYTES[dtype] * hidden_size


def hidden_header(frame: HiddenBatch) -> bytes:
    """Raises FrameError for what no receiver would take."""
    items = frame.items
    try:
        if len(items) == 1 and not items[0].draft_ids:
            (item,) = items
            assert len(item.session) == SESSION_ID_BYTES
            return _ONE_HIDDEN.pack(
                frame.dtype, frame.hidden_size, 1, item.session, item.position, item.num_tokens, 0
            )
        parts = [_HIDDEN.pack(frame.dtype, frame.hidden_size, len(items))]
        for item in items:
            assert len(item.session) == SESSION_ID_BYTES
            parts.append(_HIDDEN_ITEM.pack(item.session, item.position, item.num_tokens, len(item.draft_ids)))
        parts.extend(
            _DRAFT_IDS[len(item.draft_ids)].pack(*item.draft_ids) for item in items if item.draft_ids
        )
    except (struct.error, IndexError) as error:
        raise FrameError("a HiddenBatch that cannot be said") from error
    return b"".join(parts)


def token_header(frame: TokenBatch) -> bytes:
    """Raises FrameError for what no receiver would take."""
    items = frame.items
    try:
        parts = [_TOKENS.pack(len(items))]
        for item in items:
            assert len(item.session) == SESSION_ID_BYTES
            num_top = -1 if item.logprob is None else len(item.top_logprobs)
            parts.append(
                _TOKEN_ITEM.pack(item.session, item.position, item.token_id, item.finish_reason, num_top)
            )
        for item in items:
            if item.logprob is not None:
                parts.append(_LOGPROB.pack(_sayable(item.logprob)))
                parts.extend(_TOP_LOGPROB.pack(token, _sayable(prob)) for token, prob in item.top_logprobs)
    except struct.error as error:
        raise FrameError("a TokenBatch that cannot be said") from error
    return b"".join(parts)


def read_hidden(raw: bytes, rows: Buffer) -> HiddenBatch:
    """The frame over `rows`, not copied. Raises FrameError, and BatchError where the items can be read."""
    number, hidden_size, num_items = _start(_HIDDEN, raw)
    end = _end_of_items(_HIDDEN, _HIDDEN_ITEM, num_items, raw)
    try:
        return _hidden(raw, rows, number, hidden_size, end)
    except FrameError as error:
        raise BatchError(str(error), _sessions(_HIDDEN_ITEM, raw[_HIDDEN.size : end])) from None


def read_tokens(raw: bytes) -> TokenBatch:
    """Raises FrameError, and BatchError where the items can be read."""
    (num_items,) = _start(_TOKENS, raw)
    end = _end_of_items(_TOKENS, _TOKEN_ITEM, num_items, raw)
    try:
        return _tokens(raw, end)
    except FrameError as error:
        raise BatchError(str(error), _sessions(_TOKEN_ITEM, raw[_TOKENS.size : end])) from None


def _hidden(raw: bytes, rows: Buffer, number: int, hidden_size: int, at: int) -> HiddenBatch:
    if number >= len(_DTYPES) or not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
        raise FrameError("unknown dtype, or rows of impossible size")
    items, num_rows = [], 0
    for session, position, num_tokens, num_draft_ids in _HIDDEN_ITEM.iter_unpack(raw[_HIDDEN.size : at]):
        draft_ids: tuple[int, ...] = ()
        if num_draft_ids:
            if num_draft_ids > MAX_NUM_DRAFT_TOKENS:
                raise FrameError("too many draft ids")
            if len(raw) < at + 4 * num_draft_ids:
                raise FrameError("header too short")
            draft_ids = _DRAFT_IDS[num_draft_ids].unpack_from(raw, at)
            at += 4 * num_draft_ids
        if num_tokens == 0 or num_draft_ids > num_tokens:
            raise FrameError("an item without rows, or with more draft ids than rows")
        num_rows += num_tokens
        items.append(HiddenItem(session, position, num_tokens, draft_ids))
    dtype = _DTYPES[number]
    if at != len(raw) or num_rows * num_row_bytes(dtype, hidden_size) != len(rows):
        raise FrameError("rows or draft ids do not have the announced shape")
    return HiddenBatch(tuple(items), dtype, hidden_size, memoryview(rows))


def _tokens(raw: bytes, at: int) -> TokenBatch:
    items = []
    for session, position, token_id, reason, num_top in _TOKEN_ITEM.iter_unpack(raw[_TOKENS.size : at]):
        if reason >= len(_FINISH_REASONS) or not -1 <= num_top <= MAX_NUM_TOP_LOGPROBS:
            raise FrameError("unknown finish reason, or an impossible number of logprobs")
        if num_top < 0:
            items.append(TokenItem(session, position, token_id, _FINISH_REASONS[reason]))
            continue
        end = at + _LOGPROB.size + num_top * _TOP_LOGPROB.size
        if len(raw) < end:
            raise FrameError("header too short")
        (logprob,) = _LOGPROB.unpack_from(raw, at)
        top = tuple(_TOP_LOGPROB.iter_unpack(raw[at + _LOGPROB.size : end]))
        if not all(map(math.isfinite, (logprob, *(value for _, value in top)))):
            raise FrameError("a logprob that is no number")
        at = end
        items.append(TokenItem(session, position, token_id, _FINISH_REASONS[reason], logprob, top))
    if at != len(raw):
        raise FrameError("logprobs do not have the announced shape")
    return TokenBatch(tuple(items))


def _start(layout: struct.Struct, raw: bytes) -> tuple[int, ...]:
    if len(raw) < layout.size:
        raise FrameError("header too short")
    return layout.unpack_from(raw)


def _end_of_items(start: struct.Struct, item: struct.Struct, num_items: int, raw: bytes) -> int:
    end = start.size + num_items * item.size
    if not 1 <= num_items <= MAX_NUM_ITEMS or len(raw) < end:
        raise FrameError("too few or too many items")
    return end


def _sessions(item: struct.Struct, raw: bytes) -> tuple[bytes, ...]:
    return tuple(dict.fromkeys(session for session, *_ in item.iter_unpack(raw)))


def _sayable(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB
