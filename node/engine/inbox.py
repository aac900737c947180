"""What the loop thread is asked to do: a queue per peer, taken from in turn, so that none crowds others out.

A peer that asks for more than its queue holds is made to wait, which stops the reading of its link.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable

Call = Callable[[], object]

MAX_NUM_WAITING_PER_PEER = 1024


class Inbox:
    def __init__(self, max_num_waiting_per_peer: int = MAX_NUM_WAITING_PER_PEER) -> None:
        self._max_num_waiting = max_num_waiting_per_peer
        self._changed = threading.Condition()
        self._waiting: OrderedDict[bytes, deque[Call]] = OrderedDict()
        self._is_closed = False

    def put(self, call: Call, peer: bytes = b"") -> None:
        """At once, whatever waits; in order with what else was put for this peer."""
        with self._changed:
            self._add(call, peer)

    def put_frame(self, call: Call, peer: bytes) -> None:
        """Waits while the peer has too much waiting already; gives the call up when the inbox is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._has_room(peer))
            if not self._is_closed:
                self._add(call, peer)

    def take(self, timeout_s: float | None) -> Call | None:
        """The next call of the peer whose turn it is; None when the time is up. 0 does not wait."""
        with self._changed:
            if not self._waiting and timeout_s != 0:
                self._changed.wait_for(lambda: self._waiting, timeout_s)
            if not self._waiting:
                return None
            peer, calls = self._waiting.popitem(last=False)
            was_full = len(calls) >= self._max_num_waiting
            call = calls.popleft()
            if calls:
                self._waiting[peer] = calls
            if was_full:
                self._changed.notify_all()
            return call

    def close(self) -> None:
        """Nobody takes any more: let go of the peers that wait."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _has_room(self, peer: bytes) -> bool:
        return len(self._waiting.get(peer, ())) < self._max_num_waiting

    def _add(self, call: Call, peer: bytes) -> None:
        self._waiting.setdefault(peer, deque()).append(call)
        self._changed.notify_all()
