"""Streams completions from a node's OpenAI API and notes when tokens arrive, with little work per token.

The client shares the cores with what it measures, so it only counts events and never parses their JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field

import uvloop

READ_BYTES = 1 << 16
EVENT = b"data: {"


class StreamError(Exception):
    """The node refused or the stream broke off: one line."""


@dataclass(slots=True)
class Stream:
    """`times` of the arrival of each event, in seconds on `time.perf_counter`."""

    sent_s: float = 0.0
    times: list[float] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class Endpoint:
    host: str
    port: int
    key: str
    model: str

    async def complete(
        self, prompt: list[int], num_tokens: int, stream: Stream, temperature: float = 0.0
    ) -> None:
        """Past the end of the text, seeded. Fills `stream` while it goes on."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": temperature,
            "seed": 1,
            "ignore_eos": True,
            "stream": True,
        }
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            stream.sent_s = time.perf_counter()
            writer.write(self._request(json.dumps(body).encode()))
            status = await reader.readline()
            if b" 200 " not in status:
                answer = await reader.read(4096)
                raise StreamError(f"{status.decode().strip()}: {answer.decode(errors='replace')[-300:]}")
            await reader.readuntil(b"\r\n\r\n")
            await _count(reader, stream)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _request(self, body: bytes) -> bytes:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n"
            f"Authorization: Bearer {self.key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


async def _count(reader: asyncio.StreamReader, stream: Stream) -> None:
    rest = b""
    while data := await reader.read(READ_BYTES):
        now_s = time.perf_counter()
        data = rest + data
        num_events = data.count(EVENT)
        if b'data: {"error"' in data:
            raise StreamError(data.decode(errors="replace")[-300:])
        if num_events:
            stream.times.extend([now_s] * num_events)
            stream.started.set()
        # An event's first bytes may be split over two reads, never counted twice.
        rest = data[-len(EVENT) + 1 :]
    if not stream.times:
        raise StreamError("the stream ended without a token")


async def _complete_all(
    endpoint: Endpoint, prompts: list[list[int]], num_tokens: int, temperature: float
) -> list[Stream]:
    streams = [Stream() for _ in prompts]
    jobs = (
        endpoint.complete(ids, num_tokens, s, temperature) for ids, s in zip(prompts, streams, strict=True)
    )
    await asyncio.gather(*jobs)
    return streams


def complete_all(
    endpoint: Endpoint, prompts: list[list[int]], num_tokens: int, temperature: float = 0.0
) -> list[Stream]:
    """All at once; returns when the last has ended. Raises StreamError or OSError."""
    return uvloop.run(_complete_all(endpoint, prompts, num_tokens, temperature))
