"""Memory for received payloads, bounded: a lane that holds too much of it stops being read.

The bound follows the memory itself: a payload counts until nothing refers to its bytes any more, so a
receiver gives room back by letting go of a frame's rows and cannot forget to. Knows no frames.
"""

from __future__ import annotations

from queue import Empty, SimpleQueue


class _Rows(bytearray):
    """Bytes that report their end; every view of them, also a tensor's, keeps them alive."""

    released: SimpleQueue[int]

    def __del__(self) -> None:
        self.released.put(len(self))


class RowsBudget:
    """What one lane of one peer may hold. Used by the thread that reads that lane, and by no other."""

    def __init__(self, max_num_bytes: int) -> None:
        self._max_num_bytes = max_num_bytes
        self._num_bytes = 0
        # SimpleQueue.put may be called from a finalizer, wherever that happens to run.
        self._released: SimpleQueue[int] = SimpleQueue()

    @property
    def num_bytes(self) -> int:
        self._collect()
        return self._num_bytes

    def has_room(self, num_bytes: int) -> bool:
        """One payload is always allowed, so that a frame larger than the bound can pass alone."""
        held = self.num_bytes
        return held == 0 or held + num_bytes <= self._max_num_bytes

    def wait(self, num_bytes: int, timeout_s: float) -> bool:
        """Wait for something to be released, at most `timeout_s`; returns `has_room(num_bytes)`."""
        if not self.has_room(num_bytes):
            try:
                self._num_bytes -= self._released.get(timeout=timeout_s)
            except Empty:
                return False
        return self.has_room(num_bytes)

    def take(self, num_bytes: int) -> bytearray:
        rows = _Rows(num_bytes)
        rows.released = self._released
        self._num_bytes += num_bytes
        return rows

    def _collect(self) -> None:
        while not self._released.empty():
            self._num_bytes -= self._released.get_nowait()
