"""Listening and serving: the port is taken first, before anything else of a node starts.

Knows uvicorn; knows nothing of what it serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI

from node.gateway.connection import LimitedConnection

GRACE_S = 10
MAX_NUM_CONNECTIONS = 2048
BACKLOG = 512
# Longer than the five seconds for which popular clients keep an idle connection: they end it, not we.
KEEP_ALIVE_S = 15
HANDSHAKE_TIMEOUT_S = 10
TLS_SHUTDOWN_TIMEOUT_S = 5
CHECK_EVERY_TICKS = 10


class ListenError(Exception):
    """The address cannot be listened on. `str(error)` is one line that says what to do."""


def bind(host: str, port: int, option: str = "--api") -> socket.socket:
    """A listening socket; port 0 picks a free one. Raises `ListenError`, naming the option to change."""
    if not 0 <= port <= 65_535:
        raise ListenError(f"{port} is not a port; ports go from 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ListenError(f"cannot listen on {host}:{port}: {error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ListenError(_reason(host, port, option, error)) from None
    return listener


def _reason(host: str, port: int, option: str, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"port {port} on {host} is taken by another program; choose another with {option} {host}:PORT"
            )
        case errno.EACCES:
            return f"no permission to listen on {host}:{port}; ports below 1024 need root"
        case errno.EADDRNOTAVAIL:
            return f"{host} is not an address of this machine"
        case _:
            return f"cannot listen on {host}:{port}: {error.strerror}"


@contextlib.asynccontextmanager
async def serving(
    app: FastAPI,
    listener: socket.socket,
    *,
    tls: ssl.SSLContext | None = None,
    plain: Sequence[socket.socket] = (),
    grace_s: int = GRACE_S,
) -> AsyncIterator[None]:
    """Serve while the block runs: HTTPS at `listener` when `tls` is given, HTTP at `plain`. Leaving it stops
    listening, ends the dashboards' event streams at once, gives running generations `grace_s` to finish, then
    cancels them and waits until they have settled.
    """
    config = uvicorn.Config(
        app,
        http=LimitedConnection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        # The access rules look at the real peer; a forwarded address is the sender's word.
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MAX_NUM_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=grace_s,
    )
    server = _Server(config, listener, tls)
    running = asyncio.create_task(server.serve(sockets=[listener, *plain]))
    try:
        yield
    finally:
        app.state.dashboard.stop()
        server.should_exit = True
        await asyncio.shield(running)
        if server.server_state.tasks:
            await asyncio.wait(server.server_state.tasks, timeout=grace_s)


class _Server(uvicorn.Server):
    """With TLS on one of its sockets only, and connections that are checked for their deadlines."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        super().__init__(config)
        self._listener = listener
        self._tls = tls

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.servers = []
        for listening in sockets or ():
            options: dict[str, Any] = {}
            if self._tls is not None and listening is self._listener:
                options = {
                    "ssl": self._tls,
                    "ssl_handshake_timeout": HANDSHAKE_TIMEOUT_S,
                    "ssl_shutdown_timeout": TLS_SHUTDOWN_TIMEOUT_S,
                }
            self.servers.append(
                await loop.create_server(self._connection, sock=listening, backlog=BACKLOG, **options)
            )
        self.started = True

    def _connection(self) -> LimitedConnection:
        return LimitedConnection(self.config, self.server_state, {})

    async def on_tick(self, counter: int) -> bool:
        if counter % CHECK_EVERY_TICKS == 0:
            now_s = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                if isinstance(connection, LimitedConnection):
                    connection.check(now_s)
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the node, which has more to close than this."""
        yield
