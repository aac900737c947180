"""Server-sent events on one response, and work that ends when its client goes. Knows not what is sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

WRITE_TIMEOUT_S = 60.0


class ClientStalled(Exception):
    """The client keeps its connection and reads nothing; there is nobody to tell."""


class ClientGone(Exception):
    """The connection is closed; what would be written now would not be delivered, and must not be counted."""


# Where whoever serves says whether a connection is still open; servers drop later writes without a word.
IS_OPEN = "pod.is_open"


def is_open_of(scope: Scope) -> Callable[[], bool]:
    is_open: Callable[[], bool] = scope.get(IS_OPEN, lambda: True)
    return is_open


class EventWriter:
    """Server-sent events on one response; its headers are asked for at the first write. Several may write."""

    def __init__(
        self,
        send: Send,
        headers: Callable[[], Mapping[str, str]],
        is_open: Callable[[], bool] = lambda: True,
    ) -> None:
        self._send = send
        self._is_open = is_open
        self._headers = headers
        self.started = False
        self._turn = asyncio.Lock()
        self._last_write_s = 0.0

    @asynccontextmanager
    async def kept_alive(self, idle_s: float, begun: asyncio.Event | None = None) -> AsyncIterator[None]:
        """A comment after each `idle_s` of silence while the block runs, from `begun` on."""
        breaking = asyncio.create_task(self._break_silence(idle_s, begun))
        try:
            yield
        finally:
            breaking.cancel()
            await asyncio.gather(breaking, return_exceptions=True)

    async def _break_silence(self, idle_s: float, begun: asyncio.Event | None) -> None:
        if begun is not None:
            await begun.wait()
        loop = asyncio.get_running_loop()
        self._last_write_s = self._last_write_s or loop.time()
        while True:
            left_s = self._last_write_s + idle_s - loop.time()
            if left_s > 0:
                await asyncio.sleep(left_s)
                continue
            # Whoever writes what matters will find a stalled client too.
            with suppress(ClientStalled, ClientGone):
                await self.write(b": keep-alive\n\n")

    async def write(self, data: bytes) -> None:
        """Returns when the connection has taken all of it. Raises ClientStalled or ClientGone."""
        await self._write(data, more=True)
        # Nothing is awaited between the server's own write and here.
        if not self._is_open():
            raise ClientGone

    async def end(self, data: bytes) -> None:
        await self._write(data, more=False)

    async def _write(self, data: bytes, more: bool) -> None:
        try:
            async with self._turn, asyncio.timeout(WRITE_TIMEOUT_S):
                if not self.started:
                    headers = self._raw_headers()
                    await self._send({"type": "http.response.start", "status": 200, "headers": headers})
                    # Only now: who is cancelled while it waits has sent nothing.
                    self.started = True
                await self._send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            raise ClientStalled(f"nothing read for {WRITE_TIMEOUT_S:.0f} s") from None
        self._last_write_s = asyncio.get_running_loop().time()

    def _raw_headers(self) -> list[tuple[bytes, bytes]]:
        fixed = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        response = Response(headers={**self._headers(), **fixed}, media_type="text/event-stream")
        return [item for item in response.raw_headers if item[0] != b"content-length"]


def event(value: Mapping[str, object]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def while_connected(receive: Receive, work: Coroutine[None, None, None]) -> None:
    """Run `work`; cancel it when the client disconnects, and wait until it has cleaned up."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_client_gone(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        working.cancel()
        await asyncio.wait({working, gone})
    if not working.cancelled():
        with suppress(ClientGone):
            working.result()


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
