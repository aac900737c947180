"""The gaps between tokens of 16 streams while a long prompt arrives: does it stall the others?

The p99 gap between sending the prompt and its first token, over the median gap of the same streams before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from dataclasses import dataclass

import uvloop

from benchmarks.bench import Bench
from benchmarks.client import Endpoint, Stream
from benchmarks.pods import Pod
from benchmarks.report import Goal, Line

SECTION = "latency"
NUM_STREAMS = 16
PROMPT_TOKENS = 32
ARRIVING_TOKENS = 4096
STREAM_TOKENS = 2048
CALM_S = 2.0
TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Gaps:
    """Milliseconds. `busy_median` is of the window in which the prompt is worked on."""

    calm_median: float
    busy_median: float
    busy_p99: float
    arriving_ms: float


def run(bench: Bench) -> None:
    pod = bench.whole()
    assert isinstance(pod, Pod)
    found = []
    for _ in range(1 if bench.quick else 3):
        streams = bench.prompts.many(NUM_STREAMS, PROMPT_TOKENS)
        arriving = bench.prompts.one(ARRIVING_TOKENS)
        found.append(uvloop.run(asyncio.wait_for(_observe(pod.endpoint, streams, arriving), TIMEOUT_S)))
    what = f"p99 gap of {NUM_STREAMS} streams while a prompt of {ARRIVING_TOKENS} arrives"
    p99 = tuple(gaps.busy_p99 for gaps in found)
    median = statistics.median
    note = f"the prompt's first token after {median(gaps.arriving_ms for gaps in found):.0f} ms"
    for peer, values, goal in (
        ("their median gap before", tuple(gaps.calm_median for gaps in found), Goal(3.0, at_least=False)),
        ("their median gap meanwhile", tuple(gaps.busy_median for gaps in found), None),
    ):
        bench.add(Line(SECTION, what, "ms", p99, peer, values, goal, note=note))


async def _observe(endpoint: Endpoint, prompts: list[list[int]], arriving: list[int]) -> Gaps:
    streams = [Stream() for _ in prompts]
    pairs = zip(prompts, streams, strict=True)
    tasks = [asyncio.create_task(endpoint.complete(ids, STREAM_TOKENS, stream)) for ids, stream in pairs]
    try:
        await asyncio.gather(*(stream.started.wait() for stream in streams))
        calm_from_s = max(stream.times[0] for stream in streams)
        await asyncio.sleep(CALM_S)
        long = Stream()
        await endpoint.complete(arriving, 1, long)
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
    calm = _gaps(streams, calm_from_s, long.sent_s)
    busy = _gaps(streams, long.sent_s, long.times[0])
    return Gaps(
        statistics.median(calm),
        statistics.median(busy),
        busy[int(len(busy) * 0.99)],
        (long.times[0] - long.sent_s) * 1e3,
    )


def _gaps(streams: list[Stream], from_s: float, to_s: float) -> list[float]:
    """Milliseconds between tokens of one stream that overlap the time asked for, sorted."""
    return sorted(
        (after - before) * 1e3
        for stream in streams
        for before, after in zip(stream.times, stream.times[1:], strict=False)
        if after > from_s and before < to_s
    )
