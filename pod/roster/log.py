"""The set of roster events a node holds, in memory or in an append-only file. A record is its length, a
checksum and the event's bytes; what a crash left half-written at the end is cut off, damage anywhere else is
reported. Events are kept even when they change nothing yet: an earlier one may still arrive. But only those
of people who are or were members, and of each only so many; what others say waits for a while in memory.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pod.roster.apply import RosterError, roster_of
from pod.roster.events import (
    MAX_EVENT_BYTES,
    Event,
    EventError,
    InviteRevoked,
    KeyIssued,
    LimitedKeyIssued,
    MemberRemoved,
    PodCreated,
    Role,
    RoleChanged,
    decode_event,
)
from pod.roster.roster import Roster

# The owner alone may go beyond it: there is always room for a removal.
MAX_NUM_EVENTS = 32_768
# A member who dates an event far ahead cannot use the numbers up: nobody takes a larger jump than this.
MAX_LAMPORT_JUMP = 1 << 20
MAX_NUM_WAITING = 256
MAX_WAITING_BYTES = 1 << 20
_HEADER = struct.Struct(">I4s")


@dataclass(frozen=True, slots=True)
class Quota:
    """How much one author may say. What the owner and admins name in a cut does not count against it."""

    max_num_events: int
    max_num_bytes: int


QUOTA = Quota(256, 1 << 20)
ADMIN_QUOTA = Quota(4096, 64 << 20)
# More than a `KeyRevoked` takes.
MAX_REVOCATION_BYTES = 256


class RosterLog:
    """Not safe for several threads or processes: whoever opens the home directory owns it."""

    def __init__(self, path: Path | None, pod: bytes | None = None) -> None:
        """Reads the file if there is one. `pod` may be left out: the first event then says it."""
        self._path = path
        self._events: dict[bytes, Event] = {}
        self._waiting: dict[bytes, Event] = {}
        self._num_events: Counter[bytes] = Counter()
        self._num_bytes: Counter[bytes] = Counter()
        self._kept: set[bytes] = set()
        self._roster: Roster | None = None
        self._pod = pod
        self._lamport = 0
        self._torn_at: int | None = None
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
    def _owner(self) -> bytes | None:
        created = self._events.get(self._pod or b"")
        return created.author if created is not None else None

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
        """What this node says itself. Whether it was new; it is on disk then.

        Raises EventError when it cannot belong here, and for a key whose revocation would find no room.
        """
        self._check_room_to_revoke(event)
        return bool(self.add_all([event]))

    def add_all(self, events: Iterable[Event]) -> list[Event]:
        """Raises the first event's EventError after the others were added."""
        new, refused = self.add_possible(events)
        for error in refused.values():
            raise error
        return new

    def add_possible(self, events: Iterable[Event]) -> tuple[list[Event], dict[bytes, EventError]]:
        """The new ones, which are on disk then, and why others (by hash) are refused.

        What an unknown author says is neither: it waits in memory until the author is known or others need
        the place. Raises OSError when the disk takes nothing; then nothing has changed.
        """
        refused: dict[bytes, EventError] = {}
        before = (self._pod, self._lamport)
        todo = {event.hash: event for event in events if event.hash not in self._events}
        todo = self._waiting | todo
        new: list[Event] = []
        while taken := self._take_possible(todo, refused):
            new += taken
        try:
            self._append(new)
        except OSError:
            self._forget(new)
            self._pod, self._lamport = before
            raise
        self._waiting = _newest_within_limits(todo)
        return new, refused

    def _take_possible(self, todo: dict[bytes, Event], refused: dict[bytes, EventError]) -> list[Event]:
        """Takes out of `todo` what is added now or refused. Who joins by it is known to the next call."""
        taken = []
        for event in tuple(todo.values()):
            try:
                self._check(event)
                quota = self._quota_of(event)
                if quota is None:
                    continue
                self._check_quota(event, quota)
            except EventError as error:
                refused[event.hash] = error
            else:
                self._take(event)
                self._note_kept(event, quota)
                taken.append(event)
            del todo[event.hash]
        if taken:
            self._roster = None
        return taken

    def _check(self, event: Event) -> None:
        if self._pod is None and isinstance(event.body, PodCreated):
            self._pod = event.hash
        if (event.hash if isinstance(event.body, PodCreated) else event.pod) != self._pod:
            raise EventError("the event is of another pod")
        if event.lamport > self._lamport + MAX_LAMPORT_JUMP:
            raise EventError("the event's number is too far ahead")

    def _quota_of(self, event: Event) -> Quota | None:
        """None for an author who is no member, as far as is known before this round of events."""
        if event.hash == self._pod:
            return ADMIN_QUOTA
        if self._pod not in self._events:
            return None
        author = self.roster.members.get(event.author) or self.roster.former_members.get(event.author)
        if author is None:
            return None
        return ADMIN_QUOTA if author.role <= Role.ADMIN else QUOTA

    def _check_quota(self, event: Event, quota: Quota) -> None:
        if event.author == self._owner or event.hash in self._kept:
            return
        if len(self._events) >= MAX_NUM_EVENTS:
            raise EventError(f"the roster is full: {MAX_NUM_EVENTS} events")
        num_bytes = self._num_bytes[event.author] + len(event.raw)
        if self._num_events[event.author] >= quota.max_num_events or num_bytes > quota.max_num_bytes:
            raise EventError(f"{event.author.hex()[:8]} has used up its share of the roster")

    def _check_room_to_revoke(self, event: Event) -> None:
        """Not for what others said: logs that refused it in different orders would not end equal."""
        quota = self._quota_of(event)
        is_key = isinstance(event.body, KeyIssued | LimitedKeyIssued)
        if not is_key or quota is None or event.author == self._owner or event.hash in self._events:
            return
        keys = self.roster.keys.values()
        num_keys = 1 + sum(key.member == event.author and not key.revoked for key in keys)
        num_events = self._num_events[event.author] + 1 + num_keys
        num_bytes = self._num_bytes[event.author] + len(event.raw) + num_keys * MAX_REVOCATION_BYTES
        if num_events > quota.max_num_events or num_bytes > quota.max_num_bytes:
            raise EventError("the roster has no room for another key of this member and its revocation")

    def _take(self, event: Event) -> None:
        self._events[event.hash] = event
        self._num_events[event.author] += 1
        self._num_bytes[event.author] += len(event.raw)
        self._lamport = max(self._lamport, event.lamport)

    def _note_kept(self, event: Event, quota: Quota) -> None:
        if quota is ADMIN_QUOTA and isinstance(event.body, MemberRemoved | InviteRevoked | RoleChanged):
            self._kept.update(event.body.kept)

    def _forget(self, events: list[Event]) -> None:
        for event in events:
            del self._events[event.hash]
            self._num_events[event.author] -= 1
            self._num_bytes[event.author] -= len(event.raw)
        self._roster = None

    def _append(self, events: list[Event]) -> None:
        """All or nothing: a later record must not stand behind half a one."""
        if self._path is None or not events:
            return
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        records = b"".join(_HEADER.pack(len(event.raw), _checksum(event.raw)) + event.raw for event in events)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            num_good_bytes = os.fstat(descriptor).st_size if self._torn_at is None else self._torn_at
            # What an earlier failure could not take back.
            os.ftruncate(descriptor, num_good_bytes)
            try:
                _write_all(descriptor, records)
                os.fsync(descriptor)
            except OSError:
                self._torn_at = num_good_bytes
                os.ftruncate(descriptor, num_good_bytes)
                raise
            self._torn_at = None
        finally:
            os.close(descriptor)

    def _read(self, path: Path) -> None:
        stored = path.read_bytes()
        num_good_bytes = 0
        for raw in _records(stored, path):
            try:
                event = decode_event(raw)
                self._check(event)
                self._take(event)
            except EventError as error:
                raise RosterError(f"{path} is damaged: {error}") from None
            num_good_bytes += _HEADER.size + len(raw)
        if num_good_bytes < len(stored):
            os.truncate(path, num_good_bytes)
        for event in self._events.values():
            self._note_kept(event, self._quota_of(event) or QUOTA)


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


def _newest_within_limits(waiting: dict[bytes, Event]) -> dict[bytes, Event]:
    found: dict[bytes, Event] = {}
    num_bytes = 0
    for event in reversed(waiting.values()):
        num_bytes += len(event.raw)
        if len(found) >= MAX_NUM_WAITING or num_bytes > MAX_WAITING_BYTES:
            break
        found[event.hash] = event
    return dict(reversed(found.items()))


def _write_all(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def _checksum(raw: bytes) -> bytes:
    return hashlib.sha256(raw).digest()[:4]
