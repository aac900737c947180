"""One HTTP connection, with the limits that uvicorn leaves open: it reads headers without end and waits for
them for ever. Here a head has a size, a count and a deadline; who is refused, or has its answer early, is
listened to a little longer so that it can read why; who never reads is cut off; and a request sent before the
last answer is not taken (such clients send it again, on a new connection).

uvicorn's own: so many connections (503), bodies read no further than 64 KiB ahead, the wait between requests.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from node.gateway.events import IS_OPEN

MAX_HEAD_BYTES = 32 * 1024
MAX_URL_BYTES = 8 * 1024
MAX_NUM_HEADERS = 100
HEAD_TIMEOUT_S = 10.0
LINGER_S = 2.0
CLOSE_TIMEOUT_S = 10.0

_REASONS = {
    HTTPStatus.BAD_REQUEST: "This is not a valid HTTP request.",
    HTTPStatus.REQUEST_TIMEOUT: f"The request's head did not arrive within {HEAD_TIMEOUT_S:.0f} s.",
    HTTPStatus.REQUEST_URI_TOO_LONG: f"The URL is longer than {MAX_URL_BYTES} bytes.",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: (
        f"The headers are more than {MAX_NUM_HEADERS} or larger than {MAX_HEAD_BYTES} bytes."
    ),
}


class _Refused(Exception):
    """Raised inside the parser's callbacks; the parser then stops with an error of its own."""


class LimitedConnection(HttpToolsProtocol):
    """Whoever serves calls `check` about once a second."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Since the last piece of a body, or since the message began: heads, trailers, framing of chunks.
        self._num_unused_bytes = 0
        self._num_header_bytes = 0
        self._num_headers = 0
        self._refusal = HTTPStatus.BAD_REQUEST
        self._is_in_body = False
        self._is_deaf = False
        # A connection waits for one thing at a time.
        self._deadline_s: float | None = None

    def check(self, now_s: float) -> None:
        """End what has taken too long."""
        if self.transport.is_closing():
            self._deadline_s = self._deadline_s or now_s + CLOSE_TIMEOUT_S
            if now_s > self._deadline_s:
                self.transport.abort()
        elif self._deadline_s is not None and now_s > self._deadline_s:
            if self._num_unused_bytes and not self._is_in_body and not self._is_deaf:
                self._refuse(HTTPStatus.REQUEST_TIMEOUT)
            else:
                self.transport.close()
                self._deadline_s = now_s + CLOSE_TIMEOUT_S

    def _is_busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self, timeout_s: float) -> None:
        self._deadline_s = self.loop.time() + timeout_s

    # What arrives.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait(HEAD_TIMEOUT_S)

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        if self._deadline_s is None and not self._is_busy():
            self._wait(HEAD_TIMEOUT_S)
        self._num_unused_bytes += len(data)
        super().data_received(data)
        if self._num_unused_bytes > MAX_HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_message_begin(self) -> None:
        if self._is_busy():
            raise _Refused
        self._num_header_bytes = self._num_headers = 0
        super().on_message_begin()
        transport = self.transport
        cast(dict[str, Any], self.scope)[IS_OPEN] = lambda: not transport.is_closing()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._refusal = HTTPStatus.REQUEST_URI_TOO_LONG
            raise _Refused

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._num_header_bytes += len(name) + len(value)
        if self._num_headers > MAX_NUM_HEADERS or self._num_header_bytes > MAX_HEAD_BYTES:
            self._refusal = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise _Refused
        # What stands behind a chunked body would be added to headers that were checked already.
        if not self._is_in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._num_unused_bytes = 0
        self._is_in_body = True
        self._deadline_s = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_unused_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_unused_bytes = 0
        self._is_in_body = False
        super().on_message_complete()
        if not self._is_busy():
            self._wait(HEAD_TIMEOUT_S)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_in_body:
            self._wait(LINGER_S)

    # What is refused.

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls it when the parser has stopped."""
        self._refuse(self._refusal)

    def _refuse(self, status: HTTPStatus) -> None:
        if self._is_deaf:
            return
        self._is_deaf = True
        if not self._is_busy():
            self.transport.write(_answer(status))
            self._wait(LINGER_S)
        elif self._is_in_body:
            # Half a request is being read by the application: it sees that its client is gone.
            self.transport.abort()
        else:
            self.cycle.keep_alive = False


def _answer(status: HTTPStatus) -> bytes:
    error = {"message": _REASONS[status], "type": "invalid_request_error", "param": None, "code": None}
    body = json.dumps({"error": error}).encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\ncache-control: no-store\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
