"""The roster log as a Replicated channel: a digest to compare, short hashes to tell what one holds, and the
events the other lacks in the order they are applied. Knows no network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from pod.canonical import DecodeError, decode, encode
from pod.gossip import MAX_PIECE_BYTES
from pod.roster.events import Event, EventError, decode_event
from pod.roster.log import RosterLog

SHORT_HASH_BYTES = 8

log = logging.getLogger("pod.roster")


class RosterReplica:
    """`on_new` is called with the events that came in, after they are on disk."""

    name = "roster"

    def __init__(self, roster_log: RosterLog, on_new: Callable[[list[Event]], None]) -> None:
        self._log = roster_log
        self._on_new = on_new

    def digest(self) -> bytes:
        return self._log.digest()

    def summary(self) -> bytes:
        return b"".join(event.hash[:SHORT_HASH_BYTES] for event in self._log.events())

    def missing(self, summary: bytes) -> tuple[bytes, bool]:
        starts = range(0, len(summary), SHORT_HASH_BYTES)
        known = {summary[start : start + SHORT_HASH_BYTES] for start in starts}
        lacking = [event for event in self._log.events() if event.hash[:SHORT_HASH_BYTES] not in known]
        return event_page(lacking, MAX_PIECE_BYTES)

    async def ingest(self, peer: bytes, payload: bytes) -> int:
        events = []
        for raw in decode_page(payload):
            try:
                events.append(decode_event(raw))
            except EventError as error:
                log.warning("a roster event from %s is refused: %s", peer.hex()[:8], error)
        new = self._add(events)
        if new:
            self._on_new(new)
        return len(new)

    def _add(self, events: list[Event]) -> list[Event]:
        new = []
        for event in events:
            try:
                new += self._log.add_all([event])
            except EventError as error:
                log.warning("a roster event is refused: %s", error)
        return new


def event_page(events: list[Event], max_bytes: int) -> tuple[bytes, bool]:
    """As many of the first events as fit, and whether more are left."""
    page: list[bytes] = []
    num_bytes = 0
    for event in events:
        num_bytes += len(event.raw)
        if page and num_bytes > max_bytes:
            return encode(page), True
        page.append(event.raw)
    return encode(page), False


def decode_page(payload: bytes) -> list[bytes]:
    """Raises DecodeError unless it is a list of byte strings."""
    page = decode(payload, 4 * MAX_PIECE_BYTES)
    if not isinstance(page, list) or not all(isinstance(raw, bytes) for raw in page):
        raise DecodeError("not a list of events")
    return page
