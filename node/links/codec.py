"""Frames to bytes and back, strictly: a fixed prefix, a header, a raw payload.

    version u8 | type u8 | header_bytes u32 | payload_bytes u32 | header | payload        (big-endian)

The headers of the two frames of every step are fixed fields (`batches.py`), the others one canonical CBOR
array each, in the order of the fields in `frames.py`. The payload is the rows of a `HiddenBatch`, never
copied here, or the prompt of an `OpenSession` (`openings.py`). Decoding believes nothing: sizes are checked
on the prefix alone, before anything is read, then every type and range, and a header must be what its frame
encodes to. Knows no sockets and no sessions; what a well-formed frame means is for its receiver to judge.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import cbor2

from node.links import fields as f
from node.links.batches import (
    MAX_BATCH_HEADER_BYTES,
    hidden_header,
    read_hidden,
    read_tokens,
    token_header,
)
from node.links.batches import Buffer as Buffer
from node.links.fields import BatchError
from node.links.fields import FrameError as FrameError
from node.links.frames import (
    PREFIX_BLOCK_TOKENS,
    CloseSession,
    ErrorCode,
    Frame,
    HiddenBatch,
    Lane,
    Malformed,
    OpenSession,
    Ping,
    Pong,
    ReceiptSigned,
    SessionError,
    SessionOpened,
    SignReceipt,
    StageTiming,
    StartSession,
    TokenBatch,
)
from node.links.openings import (
    MAX_NUM_STAGES,
    MAX_OPENING_PAYLOAD_BYTES,
    opening_header,
    opening_payload,
    read_opening,
)

WIRE_VERSION = 3
_PREFIX = struct.Struct("!BBII")
PREFIX_BYTES = _PREFIX.size

MAX_HEADER_BYTES = 256 << 10
MAX_ROWS_BYTES = {Lane.DECODE: 16 << 20, Lane.BULK: 64 << 20}
MAX_RECEIPT_BYTES = 16 << 10
MAX_NUM_MESSAGE_CHARS = 1024
_MAX_DEPTH = 4
_TAGS_BUILT_IN = (*range(6), *range(21, 40), 43000, 55799, *range(256, 262), 1004, 100)
_ERROR_CODES = {int(code): code for code in ErrorCode}

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


class Prefix(NamedTuple):
    """What stands before a frame, already within every limit of its type and lane."""

    frame_type: type[Frame]
    header_bytes: int
    payload_bytes: int


def encode(frame: Frame) -> list[Buffer]:
    """The frame as buffers to be written one after the other; rows are passed on, not copied.

    Raises FrameError for a frame too large, or with sampling that its receiver would refuse.
    """
    number = _TYPE_NUMBERS[type(frame)]
    header = _header(frame)
    payload = _payload(frame)
    _, max_header_bytes, max_payload_bytes = _LIMITS[Lane.BULK][number]
    if len(header) > max_header_bytes or len(payload) > max_payload_bytes:
        raise FrameError(f"a {type(frame).__name__} too large to send")
    prefix = _PREFIX.pack(WIRE_VERSION, number, len(header), len(payload))
    return [prefix + header, payload] if payload else [prefix + header]


def parse_prefix(raw: Buffer, lane: Lane) -> Prefix:
    """Read `PREFIX_BYTES` bytes. Raises FrameError before anybody allocates what they claim."""
    if len(raw) != PREFIX_BYTES:
        raise FrameError("prefix of the wrong length")
    version, number, header_bytes, payload_bytes = _PREFIX.unpack(raw)
    limits = _LIMITS[lane].get(number)
    if version != WIRE_VERSION or limits is None:
        raise FrameError("unknown frame version or type")
    frame_type, max_header_bytes, max_payload_bytes = limits
    if header_bytes > max_header_bytes or payload_bytes > max_payload_bytes:
        raise FrameError(f"a {frame_type.__name__} of impossible size")
    return Prefix(frame_type, header_bytes, payload_bytes)


def decode(prefix: Prefix, header: Buffer, payload: Buffer) -> Frame:
    """The frame, its rows a view of `payload`. Raises FrameError, and nothing else, on anything odd."""
    raw = bytes(header)
    if len(raw) != prefix.header_bytes or len(payload) != prefix.payload_bytes:
        raise FrameError("lengths differ from the prefix")
    if prefix.frame_type is HiddenBatch:
        return read_hidden(raw, payload)
    if prefix.frame_type is TokenBatch:
        return read_tokens(raw)
    value = _load(raw)
    frame = _READERS[prefix.frame_type](value, payload)
    if cbor2.dumps(value) != raw:
        raise FrameError("header is not canonical")
    return frame


def received(prefix: Prefix, header: Buffer, payload: Buffer) -> Frame:
    """As `decode`, with a `Malformed` for a batch that only ends its sessions."""
    try:
        return decode(prefix, header, payload)
    except BatchError as error:
        return Malformed(error.sessions, str(error))


def _limits(frame_type: type[Frame], lane: Lane) -> tuple[type[Frame], int, int]:
    """The frame type, and how long its header and its payload may be."""
    if frame_type is HiddenBatch:
        return frame_type, MAX_BATCH_HEADER_BYTES, MAX_ROWS_BYTES[lane]
    if frame_type is TokenBatch:
        return frame_type, MAX_BATCH_HEADER_BYTES, 0
    return frame_type, MAX_HEADER_BYTES, MAX_OPENING_PAYLOAD_BYTES if frame_type is OpenSession else 0


_LIMITS = {
    lane: {number: _limits(frame_type, lane) for number, frame_type in _TYPES.items()} for lane in Lane
}


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
    if isinstance(frame, HiddenBatch):
        return frame.rows
    return opening_payload(frame) if isinstance(frame, OpenSession) else b""


def _header(frame: Frame) -> bytes:
    if isinstance(frame, HiddenBatch):
        return hidden_header(frame)
    return token_header(frame) if isinstance(frame, TokenBatch) else cbor2.dumps(_values(frame))


def _values(frame: Frame) -> tuple[object, ...]:
    match frame:
        case OpenSession():
            return opening_header(frame)
        case StartSession():
            return (frame.session, frame.num_cached_tokens)
        case CloseSession():
            return (frame.session,)
        case SessionOpened():
            return (frame.session, frame.stage_index, frame.num_cached_tokens)
        case SessionError():
            message = frame.message[:MAX_NUM_MESSAGE_CHARS].encode("utf-8", "replace").decode()
            return (frame.session, frame.stage_index, int(frame.code), message)
        case SignReceipt() | ReceiptSigned():
            return (frame.session, frame.receipt)
        case StageTiming():
            times = (frame.compute_us, frame.queue_us, frame.link_us)
            return (frame.session, frame.stage_index, frame.num_steps, *times)
        case Ping() | Pong():
            return (frame.nonce,)
        case HiddenBatch() | TokenBatch() | Malformed():
            raise AssertionError("has no CBOR header")


# -- reading


def _stage_index(value: object) -> int:
    return f.number(value, MAX_NUM_STAGES - 1)


def _num_cached(value: object) -> int:
    return f.multiple(value, f.U32, PREFIX_BLOCK_TOKENS)


def _read_session_error(value: object, _: Buffer) -> SessionError:
    session, index, code, message = f.fields(value, 4)
    return SessionError(
        f.session(session),
        _stage_index(index),
        f.choice(code, _ERROR_CODES),
        f.text(message, MAX_NUM_MESSAGE_CHARS),
    )


def _read_session_opened(value: object, _: Buffer) -> SessionOpened:
    session, index, num_cached = f.fields(value, 3)
    return SessionOpened(f.session(session), _stage_index(index), _num_cached(num_cached))


def _read_start_session(value: object, _: Buffer) -> StartSession:
    session, num_cached = f.fields(value, 2)
    return StartSession(f.session(session), _num_cached(num_cached))


def _read_close_session(value: object, _: Buffer) -> CloseSession:
    return CloseSession(f.session(f.fields(value, 1)[0]))


def _read_stage_timing(value: object, _: Buffer) -> StageTiming:
    session, index, *rest = f.fields(value, 6)
    return StageTiming(f.session(session), _stage_index(index), *(f.number(part, f.U63) for part in rest))


def _read_nonce(value: object) -> int:
    return f.number(f.fields(value, 1)[0], f.U64)


def _read_receipt(value: object) -> tuple[bytes, bytes]:
    session, receipt = f.fields(value, 2)
    if type(receipt) is not bytes or len(receipt) > MAX_RECEIPT_BYTES:
        raise FrameError("receipt expected, or too long")
    return f.session(session), receipt


_READERS: dict[type[Frame], Callable[[object, Buffer], Frame]] = {
    OpenSession: read_opening,
    SessionOpened: _read_session_opened,
    StartSession: _read_start_session,
    CloseSession: _read_close_session,
    SessionError: _read_session_error,
    SignReceipt: lambda value, _: SignReceipt(*_read_receipt(value)),
    ReceiptSigned: lambda value, _: ReceiptSigned(*_read_receipt(value)),
    StageTiming: _read_stage_timing,
    Ping: lambda value, _: Ping(_read_nonce(value)),
    Pong: lambda value, _: Pong(_read_nonce(value)),
}
