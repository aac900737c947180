"""What the fields of a frame may be: each function returns the value it was given or raises FrameError.

Values come from CBOR that anybody may have written, so the type is checked before the range. Knows no frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from node.links.frames import SESSION_ID_BYTES

T = TypeVar("T")

U32 = (1 << 32) - 1
U63 = (1 << 63) - 1
U64 = (1 << 64) - 1


class FrameError(Exception):
    """These bytes are not a frame. The connection they came from is not worth reading on."""


class BatchError(FrameError):
    """A batch of these sessions cannot be; where it ends is known, so the connection can be read on."""

    def __init__(self, message: str, sessions: tuple[bytes, ...]) -> None:
        super().__init__(message)
        self.sessions = sessions


def fields(value: object, num_fields: int) -> tuple[object, ...]:
    if type(value) is not tuple or len(value) != num_fields:
        raise FrameError("wrong number of fields")
    return value


def many(value: object, max_num: int) -> tuple[object, ...]:
    if type(value) is not tuple or len(value) > max_num:
        raise FrameError("not a list, or too many items")
    return value


def number(value: object, maximum: int, minimum: int = 0) -> int:
    if type(value) is not int or not minimum <= value <= maximum:
        raise FrameError("integer expected, or out of range")
    return value


def multiple(value: object, maximum: int, of: int) -> int:
    if number(value, maximum) % of:
        raise FrameError(f"a multiple of {of} expected")
    return number(value, maximum)


def blob(value: object, num_bytes: int) -> bytes:
    if type(value) is not bytes or len(value) != num_bytes:
        raise FrameError("bytes expected, or of the wrong length")
    return value


def blob_up_to(value: object, max_num_bytes: int) -> bytes:
    if type(value) is not bytes or len(value) > max_num_bytes:
        raise FrameError("bytes expected, or too many")
    return value


def session(value: object) -> bytes:
    return blob(value, SESSION_ID_BYTES)


def text(value: object, max_num_chars: int) -> str:
    if type(value) is not str or len(value) > max_num_chars:
        raise FrameError("text expected, or too long")
    return value


def real(value: object, minimum: float = -math.inf, maximum: float = math.inf) -> float:
    if type(value) is not float or not math.isfinite(value) or not minimum <= value <= maximum:
        raise FrameError("finite real number expected, or out of range")
    return value


def flag(value: object) -> bool:
    if type(value) is not bool:
        raise FrameError("true or false expected")
    return value


def choice(value: object, choices: Mapping[int, T]) -> T:
    chosen = choices.get(value) if type(value) is int else None
    if chosen is None:
        raise FrameError("not one of the choices")
    return chosen
