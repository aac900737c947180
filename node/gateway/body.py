"""Reading a request body: content type, size, time and JSON, each refused before it costs anything.

Knows no parameter; `parameters.py` gives the object its meaning.
"""

from __future__ import annotations

import asyncio
import json

from fastapi import Request

from node.gateway.errors import ApiError

MAX_BODY_BYTES = 8 * 1024 * 1024
BODY_TIMEOUT_S = 30.0

JsonObject = dict[str, object]


async def read_json_object(request: Request) -> JsonObject:
    """The body as a JSON object, or `ApiError` 400, 408, 413 or 415."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        shown = media_type or "no Content-Type"
        message = f"The body must be JSON with the header 'Content-Type: application/json', not {shown!r}."
        raise ApiError(415, message, code="unsupported_media_type")
    return _parse(await _read(request))


async def _read(request: Request) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 12 or int(announced) > MAX_BODY_BYTES):
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                if len(body) + len(piece) > MAX_BODY_BYTES:
                    raise _too_large()
                body += piece
    except TimeoutError:
        raise ApiError(
            408, f"The body did not arrive within {BODY_TIMEOUT_S:.0f} s.", code="timeout"
        ) from None
    return bytes(body)


def _too_large() -> ApiError:
    return ApiError(413, f"The body is larger than {MAX_BODY_BYTES} bytes.", code="request_too_large")


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
