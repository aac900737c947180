"""Giving back what a mapped file holds in memory: pages that were read count as the process's until then."""

from __future__ import annotations

import mmap


def forget_pages(file: mmap.mmap, start: int, end: int) -> None:
    """Whole pages between the two bytes; what is read again comes from the system's cache, or the disk."""
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    num_bytes = end // mmap.PAGESIZE * mmap.PAGESIZE - first
    if num_bytes > 0 and hasattr(mmap, "MADV_DONTNEED"):
        file.madvise(mmap.MADV_DONTNEED, first, num_bytes)
