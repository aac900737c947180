"""The stream that keeps open dashboards up to date: the same fragment as in the page, whenever it changed.

Bounded: so many connections, at most one rendering per connection and `DEBOUNCE_S`, nothing while nothing
changes. Access is asked again at every step, so a revoked key loses the picture too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from node.dashboard.pages import live_fragment
from node.gateway.backend import Backend
from node.gateway.errors import ApiError
from node.gateway.events import EventWriter, while_connected

MAX_NUM_CONNECTIONS = 32
DEBOUNCE_S = 0.25
KEEP_ALIVE_S = 15.0


class LiveViews:
    """All open event streams of one app."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._wakers: set[asyncio.Event] = set()
        self.stopped = False

    def open(self) -> asyncio.Event:
        """What wakes one stream. Raises `ApiError` 503 when there are too many."""
        if self.stopped or len(self._wakers) >= MAX_NUM_CONNECTIONS:
            message = "Too many open dashboards; close one."
            raise ApiError(503, message, type="server_error", code="too_many_dashboards")
        changed = asyncio.Event()
        self._wakers.add(changed)
        return changed

    def close(self, changed: asyncio.Event) -> None:
        self._wakers.discard(changed)

    def stop(self) -> None:
        self.stopped = True
        for changed in self._wakers:
            changed.set()


class LiveViewResponse(Response):
    def __init__(self, views: LiveViews, may_view: Callable[[], bool]) -> None:
        super().__init__()
        self._views = views
        self._may_view = may_view

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        changed = self._views.open()
        try:
            await while_connected(receive, self._stream(changed, EventWriter(send, dict)))
        finally:
            self._views.close(changed)

    async def _stream(self, changed: asyncio.Event, writer: EventWriter) -> None:
        watching = asyncio.create_task(self._watch(changed))
        try:
            await self._write_changes(changed, writer, watching)
            await writer.end(b"")
        finally:
            watching.cancel()
            await asyncio.wait({watching})

    async def _watch(self, changed: asyncio.Event) -> None:
        async with aclosing(self._views.backend.changes()) as changes:
            async for _ in changes:
                changed.set()

    async def _write_changes(
        self, changed: asyncio.Event, writer: EventWriter, watching: asyncio.Task[None]
    ) -> None:
        shown = ""
        while not self._views.stopped and not watching.done() and self._may_view():
            fragment = live_fragment(self._views.backend.dashboard())
            await writer.write(_event(fragment) if fragment != shown else b": keep-alive\n\n")
            shown = fragment
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    await changed.wait()
                    await asyncio.sleep(DEBOUNCE_S)
            except TimeoutError:
                continue
            changed.clear()
        if watching.done():
            watching.result()


def _event(fragment: str) -> bytes:
    lines = "".join(f"data: {line}\n" for line in fragment.splitlines())
    return f"event: view\n{lines}\n".encode()
