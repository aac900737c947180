"""What stages answer, sorted by session: each session of a head reads its own frames, in order.

Lives on one asyncio loop. Knows no connections: the link that feeds it says which node a frame came from.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType

from node.links.frames import (
    Frame,
    Malformed,
    ReceiptSigned,
    SessionError,
    SessionOpened,
    StageTiming,
    TokenBatch,
    TokenItem,
)

MAX_NUM_WAITING = 65536


@dataclass(frozen=True, slots=True)
class Received:
    """A frame of this session, from `node`. A `TokenBatch` holds only this session's items."""

    node: bytes
    frame: Frame


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The link to `node` ended: what it had to say to any session may be incomplete."""

    node: bytes
    reason: str


Event = Received | LinkLost


class Subscription:
    """`async for event in subscription`; leaving `with subscription:` ends it."""

    def __init__(self, owner: Subscriptions, session: bytes) -> None:
        self._owner = owner
        self._session = session
        self._events: asyncio.Queue[Event] = asyncio.Queue(MAX_NUM_WAITING + 1)
        self._overflowed = False

    def __enter__(self) -> Subscription:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            yield await self.next()

    async def next(self) -> Event:
        """The next event; the caller sets the deadline."""
        return await self._events.get()

    def next_now(self) -> Event | None:
        """The next event if it is here already."""
        return None if self._events.empty() else self._events.get_nowait()

    def close(self) -> None:
        self._owner.forget(self._session)

    def put(self, node: bytes, event: Event) -> None:
        if self._overflowed:
            return
        if self._events.qsize() >= MAX_NUM_WAITING:
            self._overflowed = True
            event = LinkLost(node, "the session does not read its frames")
        self._events.put_nowait(event)


class Subscriptions:
    """All open subscriptions of one head. Frames of sessions nobody subscribed to are dropped."""

    def __init__(self) -> None:
        self._by_session: dict[bytes, Subscription] = {}

    def open(self, session: bytes) -> Subscription:
        if session in self._by_session:
            raise ValueError("this session is subscribed to already")
        subscription = self._by_session[session] = Subscription(self, session)
        return subscription

    def forget(self, session: bytes) -> None:
        self._by_session.pop(session, None)

    def received(self, node: bytes, frame: Frame) -> None:
        match frame:
            case TokenBatch(items):
                own: dict[bytes, list[TokenItem]] = {}
                for item in items:
                    if item.session in self._by_session:
                        own.setdefault(item.session, []).append(item)
                for session, own_items in own.items():
                    self._put(session, node, TokenBatch(tuple(own_items)))
            case SessionOpened() | SessionError() | ReceiptSigned() | StageTiming():
                self._put(frame.session, node, frame)
            case Malformed(sessions, reason):
                for session in sessions:
                    if (subscription := self._by_session.get(session)) is not None:
                        subscription.put(node, LinkLost(node, reason))
            case _:
                raise ValueError(f"a {type(frame).__name__} is not an answer to a head")

    def lost(self, node: bytes, reason: str) -> None:
        for subscription in list(self._by_session.values()):
            subscription.put(node, LinkLost(node, reason))

    def _put(self, session: bytes, node: bytes, frame: Frame) -> None:
        subscription = self._by_session.get(session)
        if subscription is not None:
            subscription.put(node, Received(node, frame))
