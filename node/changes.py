"""Something that others show has changed: many tellers, many listeners, nothing lost and nothing queued.

A listener that is slow sees several changes as one. Lives on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator


class Changes:
    def __init__(self) -> None:
        self._listeners: set[asyncio.Event] = set()

    def tell(self) -> None:
        for listener in self._listeners:
            listener.set()

    async def listen(self) -> AsyncGenerator[None, None]:
        """Yields after each change (or several) until the listener stops asking."""
        changed = asyncio.Event()
        self._listeners.add(changed)
        try:
            while True:
                await changed.wait()
                changed.clear()
                yield
        finally:
            self._listeners.discard(changed)
