"""Reading a request body: content type, size, time and JSON, each refused before it costs anything. However
many send at once, what is held of bodies that are still coming is limited.

Knows no parameter; `parameters.py` gives the object its meaning.
"""

from __future__ import annotations

import asyncio
import json

from fastapi import Request

from node.gateway.errors import ApiError

MAX_BODY_BYTES = 8 * 1024 * 1024
MAX_WAITING_BYTES = 512 * 1024 * 1024
BODY_TIMEOUT_S = 30.0

JsonObject = dict[str, object]


async def read_json_object(request: Request) -> JsonObject:
    """The body as a JSON object, or `ApiError` 400, 408, 413 or 415."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        shown = media_type or "no Content-Type"
        message = f"The body must be JSON with the header 'Content-Type: application/json', not {shown!r}."
        raise ApiError(415, message, code="unsupported_media_type")
    return _parse(await read_body(request))


class BodyRoom:
    """Counts the bytes of all bodies that are being read."""

    def __init__(self, max_num_bytes: int = MAX_WAITING_BYTES) -> None:
        self._max_num_bytes = max_num_bytes
        self._num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Raises `ApiError` 503 when there is no room."""
        if self._num_bytes + num_bytes > self._max_num_bytes:
            message = "Too many large requests at once; try again."
            raise ApiError(503, message, type="server_error", code="overloaded", headers={"retry-after": "1"})
        self._num_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self._num_bytes -= num_bytes


async def read_body(request: Request, max_num_bytes: int = MAX_BODY_BYTES) -> bytes:
    """Raises `ApiError` 408, 413 or 503."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 12 or int(announced) > max_num_bytes):
        raise _too_large(max_num_bytes)
    room: BodyRoom = request.app.state.body_room
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                if len(body) + len(piece) > max_num_bytes:
                    raise _too_large(max_num_bytes)
                room.take(len(piece))
                body += piece
    except TimeoutError:
        raise ApiError(
            408, f"The body did not arrive within {BODY_TIMEOUT_S:.0f} s.", code="timeout"
        ) from None
    finally:
        room.give_back(len(body))
    return bytes(body)


def _too_large(max_num_bytes: int) -> ApiError:
    return ApiError(413, f"The body is larger than {max_num_bytes} bytes.", code="request_too_large")


def _parse(body: bytes) -> JsonObject:
    try:
        value: object = json.loads(body, parse_constant=_refuse_constant)
        # A lone surrogate ("\\ud800") parses but is no text: no tokenizer and no response can hold it.
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not valid JSON: {_one_line(error)}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _one_line(error: Exception) -> str:
    match error:
        case json.JSONDecodeError():
            return f"{error.msg} at line {error.lineno} column {error.colno}"
        case UnicodeError():
            return "not UTF-8"
        case RecursionError():
            return "nested too deeply"
        case _:
            return str(error)[:200]
