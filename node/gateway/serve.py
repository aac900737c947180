"""Listening and serving: the port is taken first, before anything else of a node starts.

Knows uvicorn; knows nothing of what it serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from fastapi import FastAPI

GRACE_S = 10
MAX_NUM_CONNECTIONS = 2048
BACKLOG = 512


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
async def serving(app: FastAPI, listener: socket.socket, *, grace_s: int = GRACE_S) -> AsyncIterator[None]:
    """Serve while the block runs. Leaving it stops listening, ends the dashboards' event streams at once,
    gives running generations `grace_s` to finish, then cancels them and waits until they have settled.
    """
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        # The access rules look at the real peer; a forwarded address is the sender's word.
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MAX_NUM_CONNECTIONS,
        timeout_graceful_shutdown=grace_s,
    )
    server = _Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        app.state.dashboard.stop()
        server.should_exit = True
        await asyncio.shield(running)
        if server.server_state.tasks:
            await asyncio.wait(server.server_state.tasks, timeout=grace_s)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the node, which has more to close than this."""
        yield
