"""The first bytes on a connection, once TLS has shown who is there: what the connection is for.

The dialler names the pod, its role, the lane, the direction of the frames and the link the connection
belongs to; the listener answers with one byte. Connections with the same link id live and die together.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from node.links.frames import (
    CloseSession,
    Frame,
    HiddenBatch,
    Lane,
    OpenSession,
    Ping,
    ReceiptSigned,
    SessionError,
    SessionOpened,
    SignReceipt,
    StageTiming,
    StartSession,
    TokenBatch,
)

HELLO_VERSION = 3
LINK_ID_BYTES = 16
_HELLO = struct.Struct("!4sBBBB32s16s")
_MAGIC = b"pod\n"
HELLO_BYTES = _HELLO.size


class Role(IntEnum):
    """As what the dialler speaks: a stage sends to the next stage, a head asks and is answered."""

    STAGE = 0
    HEAD = 1


class Direction(IntEnum):
    """Frames flow one way on a connection; the other way carries only the answers to pings."""

    TO_LISTENER = 0
    TO_DIALLER = 1


class Answer(IntEnum):
    WELCOME = 0
    OTHER_VERSION = 1
    OTHER_POD = 2


FRAMES_OF: dict[tuple[Role, Direction], frozenset[type[Frame]]] = {
    (Role.STAGE, Direction.TO_LISTENER): frozenset({HiddenBatch, TokenBatch, Ping}),
    (Role.HEAD, Direction.TO_LISTENER): frozenset(
        {OpenSession, StartSession, CloseSession, SignReceipt, Ping}
    ),
    (Role.HEAD, Direction.TO_DIALLER): frozenset(
        {SessionOpened, SessionError, TokenBatch, ReceiptSigned, StageTiming, Ping}
    ),
}
"""What may be said on each kind of connection; there are no other kinds."""


class HelloError(Exception):
    """Not a greeting of this protocol, or a refusal of ours. The message is one line."""


@dataclass(frozen=True, slots=True)
class Hello:
    pod: bytes
    role: Role
    direction: Direction
    lane: Lane
    link: bytes

    def encode(self) -> bytes:
        return _HELLO.pack(_MAGIC, HELLO_VERSION, self.role, self.direction, self.lane, self.pod, self.link)


def answer_to(raw: bytes, pod: bytes) -> tuple[Answer, Hello | None]:
    """What to answer to the first `HELLO_BYTES` bytes. Raises HelloError when they deserve no answer."""
    if len(raw) != HELLO_BYTES:
        raise HelloError("not a greeting")
    magic, version, role, direction, lane, their_pod, link = _HELLO.unpack(raw)
    if magic != _MAGIC:
        raise HelloError("not a greeting")
    if version != HELLO_VERSION:
        return Answer.OTHER_VERSION, None
    try:
        hello = Hello(their_pod, Role(role), Direction(direction), Lane(lane), link)
    except ValueError:
        raise HelloError("a greeting of an unknown kind") from None
    if (hello.role, hello.direction) not in FRAMES_OF or (
        hello.role is Role.HEAD and hello.lane is Lane.BULK
    ):
        raise HelloError("a connection that nobody opens")
    return (Answer.OTHER_POD, None) if their_pod != pod else (Answer.WELCOME, hello)


def check_answer(raw: bytes) -> None:
    """Raises HelloError unless the listener answered with a welcome."""
    if raw == bytes([Answer.OTHER_VERSION]):
        raise HelloError(f"the peer does not speak version {HELLO_VERSION} of the data plane")
    if raw == bytes([Answer.OTHER_POD]):
        raise HelloError("the peer belongs to another pod")
    if raw != bytes([Answer.WELCOME]):
        raise HelloError("the peer does not admit this node: it closed the connection")
