"""The frames of a control stream: a request, its answer or its refusal, each with the number that pairs them.
Lengths are checked before anything is allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from pod.control import MAX_KIND_BYTES, MAX_PAYLOAD_BYTES

_HEADER = struct.Struct(">BBQI")
MAX_FRAME_BYTES = _HEADER.size + MAX_KIND_BYTES + MAX_PAYLOAD_BYTES


class FrameType(IntEnum):
    REQUEST = 1
    ANSWER = 2
    REFUSAL = 3


class FrameError(ValueError):
    """Bytes that are no frame: the stream they came on cannot be used any more."""


@dataclass(frozen=True, slots=True)
class ControlFrame:
    """`kind` is empty except in requests; a refusal's payload is its reason as text."""

    type: FrameType
    number: int
    kind: str
    payload: bytes


def encode_frame(frame: ControlFrame) -> bytes:
    kind = frame.kind.encode()
    return _HEADER.pack(frame.type, len(kind), frame.number, len(frame.payload)) + kind + frame.payload


class FrameReader:
    """Cuts a stream of bytes into frames. Holds less than one frame between two calls of `feed`."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[ControlFrame]:
        """The frames completed by `data`. Raises FrameError at a bad header, before its body is awaited."""
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            number_type, num_kind_bytes, number, num_payload_bytes = _HEADER.unpack_from(self._buffer)
            if number_type not in FrameType._value2member_map_:
                raise FrameError(f"unknown frame type {number_type}")
            if num_kind_bytes > MAX_KIND_BYTES or num_payload_bytes > MAX_PAYLOAD_BYTES:
                raise FrameError(f"a frame of {num_payload_bytes} bytes is too large")
            end = _HEADER.size + num_kind_bytes + num_payload_bytes
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_HEADER.size : end])
            del self._buffer[:end]
            try:
                kind = body[:num_kind_bytes].decode()
            except UnicodeDecodeError:
                raise FrameError("the kind is not text") from None
            yield ControlFrame(FrameType(number_type), number, kind, body[num_kind_bytes:])
