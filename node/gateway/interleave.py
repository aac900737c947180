"""Several asynchronous streams read as one, with a sign of life when all are silent. Knows nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

T = TypeVar("T")


async def interleave(
    streams: Sequence[AsyncGenerator[T, None]], idle_s: float
) -> AsyncGenerator[tuple[int, T] | None, None]:
    """(index of the stream, item) as they come; None after each `idle_s` of silence. Closes all streams.

    The next item of a stream is asked for only when its last one has been taken.
    """
    waiting = {_next(stream): index for index, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, timeout=idle_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                yield None
            for task in done:
                index = waiting.pop(task)
                item = task.result()
                if item is not None:
                    yield index, item
                    waiting[_next(streams[index])] = index
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


def _next(stream: AsyncGenerator[T, None]) -> asyncio.Task[T | None]:
    async def take() -> T | None:
        return await anext(stream, None)

    return asyncio.create_task(take())
