"""Several pieces of work as one: the first that fails ends the others, and its error is the one raised."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

from node.gateway.backend import BackendRefusal

log = logging.getLogger(__name__)


async def together(works: Sequence[Coroutine[Any, Any, None]]) -> None:
    """One alone runs in the caller's own task. Of several errors the others are logged unless foreseen."""
    if len(works) == 1:
        await works[0]
        return
    failed: BaseException | None = None
    tasks: list[asyncio.Task[None]] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks += [group.create_task(work) for work in works]
    except BaseExceptionGroup as failures:
        failed, *others = failures.exceptions
        for other in others:
            if not isinstance(other, BackendRefusal):
                log.error("a choice failed", exc_info=other)
    if failed is not None:
        raise failed
    if any(task.cancelled() for task in tasks):
        raise asyncio.CancelledError
