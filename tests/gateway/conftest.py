"""The app over the fake backend, in a real uvicorn on a real socket, on an event loop in its own thread."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import pytest
import uvloop

from node.gateway.app import create_app
from node.gateway.serve import bind, serving
from tests.gateway.fake_backend import FakeBackend

T = TypeVar("T")


@dataclass
class RunningGateway:
    """`run` runs a coroutine on the gateway's loop, where the fake's events live."""

    backend: FakeBackend
    port: int
    loop: asyncio.AbstractEventLoop
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def run(self, coroutine: Awaitable[T]) -> T:
        async def wrapped() -> T:
            return await coroutine

        return asyncio.run_coroutine_threadsafe(wrapped(), self.loop).result(10)

    def call(self, function: Callable[[], object]) -> None:
        self.loop.call_soon_threadsafe(function)


def wait_until(what: str, check: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.005)


@pytest.fixture
def gateway() -> Iterator[RunningGateway]:
    yield from run_gateway(FakeBackend())


def run_gateway(
    backend: FakeBackend,
    keep_alive_s: float = 10.0,
    tls: ssl.SSLContext | None = None,
    is_strict: bool = False,
) -> Iterator[RunningGateway]:
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    loop = uvloop.new_event_loop()
    stop = asyncio.Event()

    async def main() -> None:
        app = create_app(backend, keep_alive_s=keep_alive_s, is_strict=lambda: is_strict)
        async with serving(app, listener, tls=tls, grace_s=1):
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    try:
        yield RunningGateway(backend, port, loop, "http" if tls is None else "https")
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(15)
        assert not thread.is_alive(), "the gateway did not stop"
        loop.close()
