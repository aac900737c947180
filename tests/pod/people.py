"""A small pod of people for tests: keys, and events signed with a lamport number of the test's choosing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from pod.identity import KeyPair
from pod.roster.events import (
    NO_POD,
    Body,
    Event,
    InviteIssued,
    MemberJoined,
    PodCreated,
    Role,
    application,
    sign_event,
)

NOW_MS = 1_700_000_000_000
HOUR_MS = 3_600_000


def key_of(word: str) -> KeyPair:
    return KeyPair.of_seed(hashlib.sha256(word.encode()).digest())


@dataclass
class Story:
    """Events as they are told, each after the last; `said` keeps them all."""

    created: Event = field(init=False)
    said: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        owner = key_of("olga")
        self.created = sign_event(PodCreated("alpha", "olga"), NO_POD, owner.public, owner.sign, 0, NOW_MS)
        self.said.append(self.created)

    @property
    def pod(self) -> bytes:
        return self.created.hash

    def say(self, who: str, body: Body, lamport: int | None = None, time_ms: int = NOW_MS) -> Event:
        key = key_of(who)
        number = len(self.said) if lamport is None else lamport
        event = sign_event(body, self.pod, key.public, key.sign, number, time_ms)
        self.said.append(event)
        return event

    def invite(
        self, who: str, word: str, role: Role = Role.MEMBER, uses: int = 1, lamport: int | None = None
    ) -> Event:
        body = InviteIssued(key_of(word).public, role, uses, NOW_MS + HOUR_MS)
        return self.say(who, body, lamport)

    def join(
        self, admitter: str, name: str, word: str, lamport: int | None = None, time_ms: int = NOW_MS
    ) -> Event:
        raw = application(self.pod, key_of(word), key_of(name), name, key_of(f"{name}'s node"), f"{name}-pc")
        return self.say(admitter, MemberJoined(raw), lamport, time_ms)

    def member(self, name: str, role: Role = Role.MEMBER) -> None:
        """Invited by the owner, admitted by the owner."""
        self.invite("olga", f"invite of {name}", role)
        self.join("olga", name, f"invite of {name}")
