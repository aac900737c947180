"""Frames to bytes and back, strictly: a fixed prefix, a canonical CBOR header, a raw payload.

    version u8 | type u8 | header_bytes u32 | payload_bytes u32 | header | payload        (big-endian)

The header is one CBOR array per frame type, in the order of the fields in `frames.py`. The payload is the
rows of a `HiddenBatch` or the prompt ids of an `OpenSession` (u32, little-endian) and is never copied
here. Decoding believes nothing: sizes are checked on the prefix alone, before anything is read, then every
type and range, and the header must encode to the same bytes again. Knows no sockets and no sessions; what
a well-formed frame means is for its receiver to judge.
"""

from __future__ import annotations

import math
import struct
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import cbor2

from node.links.frames import (
    MODEL_ID_BYTES,
    NODE_ID_BYTES,
    SESSION_ID_BYTES,
    CloseSession,
    Dtype,
    ErrorCode,
    FinishReason,
    Frame,
    HiddenBatch,
    HiddenItem,
    Lane,
    OpenSession,
    Ping,
    Pong,
    ReceiptSigned,
    Sampling,
    SessionError,
    SessionOpened,
    SignReceipt,
    Stage,
    StageTiming,
    StartSession,
    TokenBatch,
    TokenItem,
)

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview

WIRE_VERSION = 1
_PREFIX = struct.Struct("!BBII")
PREFIX_BYTES = _PREFIX.size

MAX_HEADER_BYTES = 256 << 10
MAX_ROWS_BYTES = {Lane.DECODE: 16 << 20, Lane.BULK: 64 << 20}
MAX_NUM_PROMPT_IDS = 1 << 20
MAX_NUM_ITEMS = 4096
MAX_NUM_STAGES = 256
MAX_NUM_EOS_IDS = 256
MAX_RECEIPT_BYTES = 16 << 10
MAX_NUM_MESSAGE_CHARS = 1024
MAX_NUM_ADDRESS_CHARS = 256
MAX_HIDDEN_SIZE = 1 << 20
_U32 = (1 << 32) - 1
_U63 = (1 << 63) - 1
_U64 = (1 << 64) - 1
_MAX_DEPTH = 4
_TAGS_BUILT_IN = (*range(6), *range(21, 40), 43000, 55799, *range(256, 262), 1004, 100)

_DTYPES = {int(dtype): dtype for dtype in Dtype}
_FINISH_REASONS = {int(reason): reason for reason in FinishReason}
_ERROR_CODES = {int(code): code for code in ErrorCode}
_DTYPE_BYTES = {Dtype.FLOAT32: 4, Dtype.BFLOAT16: 2, Dtype.FLOAT16: 2}
_KEY_ID_BYTES = 16
_MEMBER_ID_BYTES = 32

_TYPES: dict[int, type[Frame]] = {
    1: OpenSession,
    2: SessionOpened,
    3: StartSession,
    4: CloseSession,
    5: SessionError,
    6: HiddenBatch,
    7: TokenBatch,
    8: SignReceipt,
    9: ReceiptSigned,
    10: StageTiming,
    11: Ping,
    12: Pong,
}
_TYPE_NUMBERS = {frame_type: number for number, frame_type in _TYPES.items()}


class FrameError(Exception):
    """These bytes are not a frame. The connection they came from is not worth reading on."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """What stands before a frame, already within every limit of its type and lane."""

    frame_type: type[Frame]
    header_bytes: int
    payload_bytes: int


def encode(frame: Frame) -> list[Buffer]:
    """The frame as buffers to be written one after the other; rows are passed on, not copied."""
    header = cbor2.dumps(_header(frame))
    payload = _payload(frame)
    if len(header) > MAX_HEADER_BYTES or len(payload) > _max_payload_bytes(type(frame), Lane.BULK):
        raise FrameError(f"a {type(frame).__name__} too large to send")
    prefix = _PREFIX.pack(WIRE_VERSION, _TYPE_NUMBERS[type(frame)], len(header), len(payload))
    return [prefix + header, payload] if payload else [prefix + header]


def parse_prefix(raw: Buffer, lane: Lane) -> Prefix:
    """Read `PREFIX_BYTES` bytes. Raises FrameError before anybody allocates what they claim."""
    if len(raw) != PREFIX_BYTES:
        raise FrameError("prefix of the wrong length")
    version, number, header_bytes, payload_bytes = _PREFIX.unpack(raw)
    frame_type = _TYPES.get(number)
    if version != WIRE_VERSION or frame_type is None:
        raise FrameError("unknown frame version or type")
    if header_bytes > MAX_HEADER_BYTES or payload_bytes > _max_payload_bytes(frame_type, lane):
        raise FrameError(f"a {frame_type.__name__} of impossible size")
    return Prefix(frame_type, header_bytes, payload_bytes)


def decode(prefix: Prefix, header: Buffer, payload: Buffer) -> Frame:
    """The frame, its rows a view of `payload`. Raises FrameError, and nothing else, on anything odd."""
    raw = bytes(header)
    if len(raw) != prefix.header_bytes or len(payload) != prefix.payload_bytes:
        raise FrameError("lengths differ from the prefix")
    value = _load(raw)
    frame = _READERS[prefix.frame_type](value, payload)
    if cbor2.dumps(value) != raw:
        raise FrameError("header is not canonical")
    return frame


def _max_payload_bytes(frame_type: type[Frame], lane: Lane) -> int:
    if frame_type is HiddenBatch:
        return MAX_ROWS_BYTES[lane]
    return 4 * MAX_NUM_PROMPT_IDS if frame_type is OpenSession else 0


def _refuse_tag(_: object, __: bool) -> NoReturn:
    """The library decodes known tags into dates, patterns and decimals: time and space for the asking."""
    raise FrameError("header contains a tag")


_NO_TAGS: dict[int, Callable[[object, bool], object]] = dict.fromkeys(_TAGS_BUILT_IN, _refuse_tag)


def _load(raw: bytes) -> object:
    try:
        value: object = cbor2.loads(
            raw, max_depth=_MAX_DEPTH, allow_indefinite=False, immutable=True, semantic_decoders=_NO_TAGS
        )
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise FrameError("header is not CBOR") from error
    return value


# -- writing


def _payload(frame: Frame) -> Buffer:
    match frame:
        case HiddenBatch():
            return frame.rows
        case OpenSession():
            return _u32_bytes(frame.prompt_ids)
        case _:
            return b""


def _header(frame: Frame) -> tuple[object, ...]:
    match frame:
        case HiddenBatch():
            items = [(item.session, item.position, item.num_tokens) for item in frame.items]
            return (items, int(frame.dtype), frame.hidden_size)
        case TokenBatch():
            return ([(i.session, i.position, i.token_id, int(i.finish_reason)) for i in frame.items],)
        case OpenSession():
            return _open_session_header(frame)
        case StartSession() | CloseSession():
            return (frame.session,)
        case SessionOpened():
            return (frame.session, frame.stage_index)
        case SessionError():
            message = frame.message[:MAX_NUM_MESSAGE_CHARS].encode("utf-8", "replace").decode()
            return (frame.session, frame.stage_index, int(frame.code), message)
        case SignReceipt() | ReceiptSigned():
            return (frame.session, frame.receipt)
        case StageTiming():
            return (frame.session, frame.stage_index, frame.num_steps, frame.compute_us, frame.queue_us)
        case Ping() | Pong():
            return (frame.nonce,)


def _open_session_header(frame: OpenSession) -> tuple[object, ...]:
    sampling = frame.sampling
    return (
        frame.session,
        frame.model,
        [(stage.node, stage.data_address, stage.start_layer, stage.end_layer) for stage in frame.route],
        frame.stage_index,
        frame.head,
        frame.payer,
        frame.key_id,
        frame.hold_microcredits,
        frame.num_prompt_tokens,
        (
            float(sampling.temperature),
            float(sampling.top_p),
            sampling.top_k,
            sampling.seed,
            sampling.max_num_output_tokens,
            sampling.min_num_output_tokens,
            sampling.ignore_eos,
            sampling.eos_token_ids,
        ),
        frame.deadline_ms,
        frame.rate_card_version,
        frame.num_output_tokens_before,
    )


def _u32_bytes(values: Sequence[int]) -> bytes:
    words = array("I", values)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


# -- reading


def _fields(value: object, num_fields: int) -> tuple[object, ...]:
    if type(value) is not tuple or len(value) != num_fields:
        raise FrameError("wrong number of fields")
    return value


def _many(value: object, max_num: int, min_num: int = 0) -> tuple[object, ...]:
    if type(value) is not tuple or not min_num <= len(value) <= max_num:
        raise FrameError("not a list, or too few or too many items")
    return value


def _number(value: object, maximum: int, minimum: int = 0) -> int:
    if type(value) is not int or not minimum <= value <= maximum:
        raise FrameError("integer expected, or out of range")
    return value


def _blob(value: object, num_bytes: int) -> bytes:
    if type(value) is not bytes or len(value) != num_bytes:
        raise FrameError("bytes expected, or of the wrong length")
    return value


def _session(value: object) -> bytes:
    return _blob(value, SESSION_ID_BYTES)


def _text(value: object, max_num_chars: int) -> str:
    if type(value) is not str or len(value) > max_num_chars:
        raise FrameError("text expected, or too long")
    return value


def _real(value: object) -> float:
    if type(value) is not float or not math.isfinite(value):
        raise FrameError("finite real number expected")
    return value


def _flag(value: object) -> bool:
    if type(value) is not bool:
        raise FrameError("true or false expected")
    return value


def _choice(value: object, choices: Mapping[int, T]) -> T:
    choice = choices.get(value) if type(value) is int else None
    if choice is None:
        raise FrameError("not one of the choices")
    return choice


def _u32_values(payload: Buffer) -> Sequence[int]:
    """A view of the payload: ten times smaller than Python's integers, and counted where the bytes are."""
    if len(payload) % 4:
        raise FrameError("prompt ids of the wrong length")
    if sys.byteorder == "little":
        return memoryview(payload).cast("B").cast("I")
    words = array("I", bytes(payload))
    words.byteswap()
    return words


def _read_hidden_batch(value: object, payload: Buffer) -> HiddenBatch:
    raw_items, raw_dtype, raw_hidden_size = _fields(value, 3)
    items = tuple(map(_read_hidden_item, _many(raw_items, MAX_NUM_ITEMS, 1)))
    dtype = _choice(raw_dtype, _DTYPES)
    hidden_size = _number(raw_hidden_size, MAX_HIDDEN_SIZE, 1)
    num_rows = sum(item.num_tokens for item in items)
    if num_rows * hidden_size * _DTYPE_BYTES[dtype] != len(payload):
        raise FrameError("rows do not have the announced shape")
    return HiddenBatch(items, dtype, hidden_size, memoryview(payload))


def _read_hidden_item(value: object) -> HiddenItem:
    session, position, num_tokens = _fields(value, 3)
    return HiddenItem(_session(session), _number(position, _U32), _number(num_tokens, _U32, 1))


def _read_token_batch(value: object, _: Buffer) -> TokenBatch:
    (items,) = _fields(value, 1)
    return TokenBatch(tuple(map(_read_token_item, _many(items, MAX_NUM_ITEMS, 1))))


def _read_token_item(value: object) -> TokenItem:
    session, position, token_id, reason = _fields(value, 4)
    finish_reason = _choice(reason, _FINISH_REASONS)
    return TokenItem(_session(session), _number(position, _U32), _number(token_id, _U32), finish_reason)


def _read_open_session(value: object, payload: Buffer) -> OpenSession:
    f = _fields(value, 13)
    return OpenSession(
        session=_session(f[0]),
        model=_blob(f[1], MODEL_ID_BYTES),
        route=tuple(map(_read_stage, _many(f[2], MAX_NUM_STAGES))),
        stage_index=_number(f[3], MAX_NUM_STAGES - 1),
        head=_blob(f[4], NODE_ID_BYTES),
        payer=_blob(f[5], _MEMBER_ID_BYTES),
        key_id=_blob(f[6], _KEY_ID_BYTES),
        hold_microcredits=_number(f[7], _U63),
        num_prompt_tokens=_number(f[8], _U32),
        sampling=_read_sampling(f[9]),
        deadline_ms=_number(f[10], _U63),
        rate_card_version=_number(f[11], _U32),
        num_output_tokens_before=_number(f[12], _U32),
        prompt_ids=_u32_values(payload),
    )


def _read_stage(value: object) -> Stage:
    node, address, start_layer, end_layer = _fields(value, 4)
    return Stage(
        _blob(node, NODE_ID_BYTES),
        _text(address, MAX_NUM_ADDRESS_CHARS),
        _number(start_layer, _U32),
        _number(end_layer, _U32),
    )


def _read_sampling(value: object) -> Sampling:
    f = _fields(value, 8)
    return Sampling(
        temperature=_real(f[0]),
        top_p=_real(f[1]),
        top_k=_number(f[2], _U32),
        seed=_number(f[3], _U64, -_U63 - 1),
        max_num_output_tokens=_number(f[4], _U32),
        min_num_output_tokens=_number(f[5], _U32),
        ignore_eos=_flag(f[6]),
        eos_token_ids=tuple(_number(token_id, _U32) for token_id in _many(f[7], MAX_NUM_EOS_IDS)),
    )


def _read_session_error(value: object, _: Buffer) -> SessionError:
    session, stage_index, code, message = _fields(value, 4)
    return SessionError(
        _session(session),
        _number(stage_index, MAX_NUM_STAGES - 1),
        _choice(code, _ERROR_CODES),
        _text(message, MAX_NUM_MESSAGE_CHARS),
    )


def _read_session_opened(value: object, _: Buffer) -> SessionOpened:
    session, stage_index = _fields(value, 2)
    return SessionOpened(_session(session), _number(stage_index, MAX_NUM_STAGES - 1))


def _read_stage_timing(value: object, _: Buffer) -> StageTiming:
    session, stage_index, *times = _fields(value, 5)
    num_steps, compute_us, queue_us = (_number(time, _U63) for time in times)
    return StageTiming(
        _session(session), _number(stage_index, MAX_NUM_STAGES - 1), num_steps, compute_us, queue_us
    )


def _read_session(value: object) -> bytes:
    return _session(_fields(value, 1)[0])


def _read_nonce(value: object) -> int:
    return _number(_fields(value, 1)[0], _U64)


def _read_receipt(value: object) -> tuple[bytes, bytes]:
    session, receipt = _fields(value, 2)
    if type(receipt) is not bytes or len(receipt) > MAX_RECEIPT_BYTES:
        raise FrameError("receipt expected, or too long")
    return _session(session), receipt


_READERS: dict[type[Frame], Callable[[object, Buffer], Frame]] = {
    OpenSession: _read_open_session,
    SessionOpened: _read_session_opened,
    StartSession: lambda value, _: StartSession(_read_session(value)),
    CloseSession: lambda value, _: CloseSession(_read_session(value)),
    SessionError: _read_session_error,
    HiddenBatch: _read_hidden_batch,
    TokenBatch: _read_token_batch,
    SignReceipt: lambda value, _: SignReceipt(*_read_receipt(value)),
    ReceiptSigned: lambda value, _: ReceiptSigned(*_read_receipt(value)),
    StageTiming: _read_stage_timing,
    Ping: lambda value, _: Ping(_read_nonce(value)),
    Pong: lambda value, _: Pong(_read_nonce(value)),
}
