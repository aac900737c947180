"""The thread that watches the listener and every sending socket of one node's stage links.

It writes what the senders' queues hold (decode before bulk, one slice each in turn), reads their pongs,
pings them, and reports the first that fails. Knows no peers: each sender comes with whom to tell.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from node.links.frames import Lane
from node.links.limits import LinkLimits
from node.links.port import LinkDown, LinkFull
from node.links.wires import Sender

_WAKE_BYTES = 4096
_STOP_TIMEOUT_S = 2.0


class Watch:
    """`add` and `attend` may be called from any thread; everything else happens on the thread of `start`."""

    def __init__(
        self,
        listener: socket.socket,
        on_accept: Callable[[socket.socket], None],
        on_tick: Callable[[], None],
        limits: LinkLimits,
    ) -> None:
        self._listener = listener
        self._on_accept = on_accept
        self._on_tick = on_tick
        self._limits = limits
        self._num_ticks = 0
        self._on_lost: dict[Sender, Callable[[str], None]] = {}
        self._new: SimpleQueue[tuple[Sender, Callable[[str], None]]] = SimpleQueue()
        self._attended: SimpleQueue[Sender] = SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._bell, self._ringer = socket.socketpair()
        self._is_rung = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="link-watch", daemon=True)

    def start(self) -> None:
        for sock in (self._listener, self._bell, self._ringer):
            sock.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._thread.start()

    def add(self, sender: Sender, on_lost: Callable[[str], None]) -> None:
        """Watch this sender from now on, and close it in the end."""
        self._new.put((sender, on_lost))
        self._ring()

    def attend(self, sender: Sender) -> None:
        """Its queue has something to write."""
        self._attended.put(sender)
        self._ring()

    def stop(self) -> None:
        self._stopped = True
        self._ring()
        if self._thread is not threading.current_thread():
            self._thread.join(_STOP_TIMEOUT_S)

    def _ring(self) -> None:
        if not self._is_rung:
            self._is_rung = True
            try:
                self._ringer.send(b"\0")
            except OSError:
                return

    def _run(self) -> None:
        next_tick = time.monotonic() + self._limits.tick_s
        while not self._stopped:
            ready = self._wait(max(0.0, next_tick - time.monotonic()))
            for sender in sorted(ready, key=lambda sender: sender.lane):
                self._service(sender)
            if time.monotonic() >= next_tick:
                self._tick()
                next_tick = time.monotonic() + self._limits.tick_s
        self._close()

    def _wait(self, timeout_s: float) -> set[Sender]:
        """The senders that have something to read or to write."""
        ready: set[Sender] = set()
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._bell:
                self._answer_bell(ready)
            elif isinstance(key.fileobj, Sender):
                ready.add(key.fileobj)
        return ready

    def _answer_bell(self, ready: set[Sender]) -> None:
        self._bell.recv(_WAKE_BYTES)
        # Before the queues are looked at: what is put there from here on rings again.
        self._is_rung = False
        while True:
            try:
                sender, on_lost = self._new.get_nowait()
            except Empty:
                break
            self._on_lost[sender] = on_lost
            self._selector.register(sender, selectors.EVENT_READ)
            ready.add(sender)
            if sender.lane is Lane.DECODE:
                # So that the length of the way is known from the start.
                self._ping(sender)
        while True:
            try:
                ready.add(self._attended.get_nowait())
            except Empty:
                return

    def _accept(self) -> None:
        try:
            raw, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:
            # Out of descriptors: the listener would stay readable, so look away until the next tick.
            self._selector.unregister(self._listener)
            return
        self._on_accept(raw)

    def _service(self, sender: Sender) -> None:
        if sender not in self._on_lost:
            return
        try:
            waiting = sender.service()
        except LinkDown as error:
            self._lose(sender, str(error))
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if waiting else 0)
        if self._selector.get_key(sender).events != events:
            self._selector.modify(sender, events)

    def _lose(self, sender: Sender, reason: str) -> None:
        on_lost = self._on_lost.pop(sender)
        self._selector.unregister(sender)
        sender.close()
        on_lost(reason)

    def _tick(self) -> None:
        self._num_ticks += 1
        if self._listener.fileno() not in self._selector.get_map():
            self._selector.register(self._listener, selectors.EVENT_READ)
        is_ping_due = self._num_ticks % self._limits.num_ticks_per_ping == 0
        for sender in [sender for sender in self._on_lost if sender.lane is Lane.DECODE]:
            sender.num_silent_ticks += 1
            if sender.num_silent_ticks > self._limits.max_num_silent_ticks:
                self._lose(sender, "no answer to pings")
            elif is_ping_due:
                self._ping(sender)
        self._on_tick()

    def _ping(self, sender: Sender) -> None:
        try:
            if sender.ping():
                self._service(sender)
        except LinkFull:
            return  # Still counted as silent: a full lane that does not move is a dead one.
        except LinkDown as error:
            self._lose(sender, str(error))

    def _close(self) -> None:
        for sender in self._on_lost:
            sender.close()
        while not self._new.empty():
            self._new.get_nowait()[0].close()
        for sock in (self._listener, self._bell, self._ringer):
            sock.close()
        self._selector.close()
