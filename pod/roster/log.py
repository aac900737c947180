"""The set of roster events a node holds, in memory or in an append-only file. A record is its length, a
checksum and the event's bytes; what a crash left half-written at the end is cut off, damage anywhere else is
reported. Events are kept even when they change nothing yet: an earlier one may still arrive.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from pod.roster.apply import RosterError, roster_of
from pod.roster.events import MAX_EVENT_BYTES, Event, EventError, PodCreated, decode_event
from pod.roster.roster import Roster

MAX_NUM_EVENTS = 32_768
# A member who dates an event far ahead cannot use the numbers up: nobody takes a larger jump than this.
MAX_LAMPORT_JUMP = 1 << 20
_HEADER = struct.Struct(">I4s")


class RosterLog:
    """Not safe for several threads or processes: whoever opens the home directory owns it."""

    def __init__(self, path: Path | None, pod: bytes | None = None) -> None:
        """Reads the file if there is one. `pod` may be left out: the first event then says it."""
        self._path = path
        self._events: dict[bytes, Event] = {}
        self._roster: Roster | None = None
        self._pod = pod
        self._lamport = 0
        if path is not None and path.exists():
            self._read(path)

    @property
    def pod(self) -> bytes:
        if self._pod is None:
            raise RosterError("this machine is in no pod yet")
        return self._pod

    @property
    def roster(self) -> Roster:
        if self._roster is None:
            self._roster = roster_of(self.pod, self._events.values())
        return self._roster

    @property
    def next_lamport(self) -> int:
        return self._lamport + 1

    def events(self) -> tuple[Event, ...]:
        """All events in the order they are applied."""
        return tuple(sorted(self._events.values(), key=lambda event: event.order))

    def __contains__(self, hash: bytes) -> bool:
        return hash in self._events

    def __len__(self) -> int:
        return len(self._events)

    def digest(self) -> bytes:
        """Equal on two nodes exactly when they hold the same events."""
        return hashlib.sha256(b"".join(sorted(self._events))).digest()

    def add(self, event: Event) -> bool:
        """Whether it was new; it is on disk then. Raises EventError when it cannot belong here."""
        return bool(self.add_all([event]))

    def add_all(self, events: Iterable[Event]) -> list[Event]:
        new: list[Event] = []
        try:
            for event in events:
                if event.hash not in self._events:
                    self._take(event)
                    new.append(event)
        finally:
            self._append(new)
        return new

    def _take(self, event: Event) -> None:
        if self._pod is None and isinstance(event.body, PodCreated):
            self._pod = event.hash
        if (event.hash if isinstance(event.body, PodCreated) else event.pod) != self._pod:
            raise EventError("the event is of another pod")
        if event.lamport > self._lamport + MAX_LAMPORT_JUMP:
            raise EventError("the event's number is too far ahead")
        if len(self._events) >= MAX_NUM_EVENTS:
            raise EventError(f"the roster is full: {MAX_NUM_EVENTS} events")
        self._events[event.hash] = event
        self._lamport = max(self._lamport, event.lamport)
        self._roster = None

    def _append(self, events: list[Event]) -> None:
        if self._path is None or not events:
            return
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self._path, "ab") as file:
            file.write(
                b"".join(_HEADER.pack(len(event.raw), _checksum(event.raw)) + event.raw for event in events)
            )
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path) -> None:
        stored = path.read_bytes()
        num_good_bytes = 0
        for raw in _records(stored, path):
            try:
                self._take(decode_event(raw))
            except EventError as error:
                raise RosterError(f"{path} is damaged: {error}") from None
            num_good_bytes += _HEADER.size + len(raw)
        if num_good_bytes < len(stored):
            os.truncate(path, num_good_bytes)


def _records(stored: bytes, path: Path) -> Iterator[bytes]:
    """The whole records; stops at a torn last one."""
    start = 0
    while start + _HEADER.size <= len(stored):
        num_bytes, checksum = _HEADER.unpack_from(stored, start)
        raw = stored[start + _HEADER.size : start + _HEADER.size + num_bytes]
        start += _HEADER.size + num_bytes
        if len(raw) == num_bytes and _checksum(raw) == checksum:
            yield raw
            continue
        rest = stored[start - _HEADER.size - num_bytes :]
        # A power cut may leave the grown file's end as zeros.
        if not any(rest) or (num_bytes <= MAX_EVENT_BYTES and start >= len(stored)):
            return
        raise RosterError(f"{path} is damaged at byte {len(stored) - len(rest)}")


def _checksum(raw: bytes) -> bytes:
    return hashlib.sha256(raw).digest()[:4]
