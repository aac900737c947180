"""The ledger on a thread of its own: appends wait for the disk, the event loop must not.

One thread, so entries are written in the order they were asked for. Knows nothing of what is written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ledger.entry import Body, Entry
from ledger.ledger import Ledger

Result = TypeVar("Result")


class LedgerThread:
    """A cancelled caller doesn't undo what was queued. `on_append` is called on the event loop."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.on_append: Callable[[], None] = lambda: None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="ledger")

    async def run(self, call: Callable[[Ledger], Result]) -> Result:
        """Queue one call and wait for it."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, call, self.ledger)

    async def append(self, body: Body) -> Entry:
        """Write this node's next entry. Raises LedgerError or JournalError."""
        entry = await self.run(lambda ledger: ledger.append(body))
        self.on_append()
        return entry

    def close(self) -> None:
        """Finish what is queued, then close the ledger."""
        self._executor.shutdown(wait=True)
        self.ledger.close()
