"""The thread that runs the libp2p host in a trio loop of its own, and runs it again when it crashes. Calls
cross into it by `call`; what comes out of it is for the caller's events to carry over.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable

import trio

from pod.control import ControlError
from pod.p2p.host import Host

RESTART_DELAY_S = 0.5
STOP_TIMEOUT_S = 5.0

log = logging.getLogger("pod.p2p")


class HostThread:
    """`make_host` is asked for a fresh host at every start; `on_ready` gets its addresses or an error."""

    def __init__(
        self,
        make_host: Callable[[], Host],
        on_ready: Callable[[list[str] | ControlError], None],
        on_crash: Callable[[], None],
    ) -> None:
        self._make_host = make_host
        self._on_ready = on_ready
        self._on_crash = on_crash
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._token: trio.lowlevel.TrioToken | None = None
        self._host: Host | None = None
        self._scope: trio.CancelScope | None = None
        self._thread = threading.Thread(target=self._run, name="pod-p2p", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Blocks until the thread has ended, five seconds at most."""
        self._stopping.set()
        self._submit(self._cancel)
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)

    def call(self, action: Callable[[Host], None]) -> None:
        """Runs `action` in the host's loop soon. Dropped while it is down: its links are gone anyway."""
        self._submit(lambda: action(self._host) if self._host is not None else None)

    def spawn(self, action: Callable[[Host], Awaitable[None]]) -> None:
        """Starts `action` as a task in the host's loop; it must not raise."""
        self._submit(lambda: trio.lowlevel.spawn_system_task(self._guarded, action))

    async def _guarded(self, action: Callable[[Host], Awaitable[None]]) -> None:
        if self._host is not None:
            await action(self._host)

    def _submit(self, function: Callable[[], object]) -> None:
        with self._lock:
            token = self._token
        if token is None:
            return
        try:
            token.run_sync_soon(function)
        except trio.RunFinishedError:
            log.debug("the libp2p host is down")

    def _cancel(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                trio.run(self._main)
            except BaseException as error:
                if not self._stopping.is_set():
                    log.error("the libp2p host crashed and is started again: %r", error)
            with self._lock:
                self._token = None
            self._host = self._scope = None
            if self._stopping.is_set():
                return
            self._on_crash()
            self._stopping.wait(RESTART_DELAY_S)

    async def _main(self) -> None:
        self._host = self._make_host()
        with trio.CancelScope() as self._scope:
            with self._lock:
                self._token = trio.lowlevel.current_trio_token()
            if self._stopping.is_set():
                return
            try:
                await self._host.run(self._on_ready)
            except* ControlError as group:
                error = _first(group)
                self._on_ready(error)
                await trio.sleep_forever()


def _first(group: BaseExceptionGroup[ControlError]) -> ControlError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, ControlError)
    return error
