"""Memory for weights: large pieces in huge pages where the system has them, handed out from the front.

A step reads every weight once: with pages of 4 KiB the look-up of addresses costs a tenth of the time.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

ALIGNMENT_BYTES = 64
PIECE_BYTES = 64 << 20


class Arena:
    """Freed as a whole, with the object."""

    def __init__(self) -> None:
        self._pieces: list[mmap.mmap] = []
        self._free_bytes = 0
        self._next = 0
        self.num_bytes = 0

    def allocate(self, num_bytes: int) -> int:
        """The address of so many bytes. Raises OSError when there is no memory."""
        rounded = -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if rounded > self._free_bytes:
            self._add_piece(max(rounded, PIECE_BYTES))
        address = self._next
        self._next += rounded
        self._free_bytes -= rounded
        self.num_bytes += num_bytes
        return address

    def _add_piece(self, num_bytes: int) -> None:
        piece = mmap.mmap(-1, num_bytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Not every Linux kernel has them.
            with contextlib.suppress(OSError):
                piece.madvise(mmap.MADV_HUGEPAGE)
        self._pieces.append(piece)
        self._free_bytes = num_bytes
        self._next = ctypes.addressof(ctypes.c_char.from_buffer(piece))
