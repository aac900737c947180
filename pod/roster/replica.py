"""The roster log as a Replicated channel: a digest to compare, short hashes to tell what one holds, and the
events the other lacks in the order they are applied. Knows no network.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable

from pod.canonical import DecodeError, decode, encode
from pod.gossip import MAX_PIECE_BYTES
from pod.roster.events import Event, EventError, MemberJoined, MemberRemoved, RoleChanged, decode_event
from pod.roster.log import RosterLog

SHORT_HASH_BYTES = 8
MAX_NUM_UNWANTED = 4096

log = logging.getLogger("pod.roster")


class RosterReplica:
    """`on_new` is called with the events that came in, after they are on disk."""

    name = "roster"

    def __init__(self, roster_log: RosterLog, on_new: Callable[[list[Event]], None]) -> None:
        self._log = roster_log
        self._on_new = on_new
        self._unwanted: dict[bytes, None] = {}

    def digest(self) -> bytes:
        return self._log.digest()

    def summary(self) -> bytes:
        """With what was refused: it need not be sent again before the rest."""
        held = [event.hash[:SHORT_HASH_BYTES] for event in self._log.events()]
        return b"".join([*held, *self._unwanted])

    def missing(self, summary: bytes) -> tuple[bytes, bool]:
        starts = range(0, len(summary), SHORT_HASH_BYTES)
        known = {summary[start : start + SHORT_HASH_BYTES] for start in starts}
        lacking = [event for event in self._log.events() if event.hash[:SHORT_HASH_BYTES] not in known]
        return event_page(lacking, MAX_PIECE_BYTES)

    async def ingest(self, peer: bytes, payload: bytes) -> int:
        page = decode_page(payload)
        events = []
        for raw in page:
            try:
                events.append(decode_event(raw))
            except EventError as error:
                log.warning("a roster event from %s is refused: %s", peer.hex()[:8], error)
        try:
            new, refused = self._log.add_possible(events)
        except OSError as error:
            log.error("the roster cannot be written: %s", error.strerror)
            return 0
        for reason in set(map(str, refused.values())):
            log.warning("roster events from %s are refused: %s", peer.hex()[:8], reason)
        self._remember_unwanted(page, new)
        if new:
            self._on_new(new)
        return len(new)

    def _remember_unwanted(self, page: list[bytes], new: list[Event]) -> None:
        if any(isinstance(event.body, MemberJoined | RoleChanged | MemberRemoved) for event in new):
            # What was refused may be welcome now.
            self._unwanted.clear()
        for raw in page:
            hash = hashlib.sha256(raw).digest()
            if hash not in self._log:
                self._unwanted[hash[:SHORT_HASH_BYTES]] = None
        while len(self._unwanted) > MAX_NUM_UNWANTED:
            del self._unwanted[next(iter(self._unwanted))]


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
