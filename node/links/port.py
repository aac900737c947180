"""The stage link port: how an engine reaches other stages and the heads of its sessions.

An engine dials the stages it sends to and is dialled by the stages that send to it; a head dials the
stages and reads their answers on a connection it opened. One node can be both at once, a stage and a
head, under one node id, so the two are addressed by different calls. This file knows no transport.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from node.links.frames import Frame, Lane

FrameCallback = Callable[[bytes, Frame], None]
"""`on_frame(peer, frame)`, on a thread of the link, in order per sender and lane. It hands over and returns:
while it runs, that lane of that peer is not read and its pings go unanswered. It must not call `close`."""

DownCallback = Callable[[bytes, str], None]
"""`on_link_down(peer, reason)` or `on_head_down(head, reason)`: once per lost link, after its last frame was
sent or given up. Sessions over that peer have lost frames and cannot go on; `connect` starts anew."""


class LinkDown(Exception):
    """There is no link to that peer, or it could not be made. The message is one line."""


class LinkFull(Exception):
    """The peer's send queue is at its bound; nothing of the frame was sent."""


@dataclass(frozen=True, slots=True)
class FrameCount:
    num_frames: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LinkCounts:
    """Frames and their encoded bytes (prefix, header and rows) by frame type, since the links began."""

    sent: Mapping[type[Frame], FrameCount]
    received: Mapping[type[Frame], FrameCount]


class StageLinks(Protocol):
    """All calls may come from any thread. Only `connect` waits for the network."""

    @property
    def data_address(self) -> str:
        """The address this node is reached at, `host:port`."""
        ...

    def connect(self, peer: bytes, data_address: str, timeout_s: float) -> None:
        """Dial both lanes to a stage, or do nothing when they are up. Raises LinkDown.

        Only nodes of the roster are dialled, whatever the address.
        """
        ...

    def is_connected(self, peer: bytes) -> bool:
        """Whether `connect` has nothing to do."""
        ...

    def send(self, peer: bytes, frame: Frame, lane: Lane) -> None:
        """Queue a frame to a connected stage. Never waits. Raises LinkDown or LinkFull.

        The rows of a `HiddenBatch` are not copied: they must not change until they are sent.
        """
        ...

    def send_to_head(self, head: bytes, frame: Frame) -> None:
        """Queue a frame to a head that has dialled this node. Never waits. Raises LinkDown or LinkFull."""
        ...

    def can_send_bulk(self, peer: bytes) -> bool:
        """Whether the BULK queue to `peer` takes one more chunk now (False as well when it is down).

        Room comes back as the peer reads, and the peer stops reading BULK while it still holds more rows
        than its limit: memory is given back by letting go of `HiddenBatch.rows`, nothing else.
        """
        ...

    def link_us(self, peer: bytes) -> int:
        """Half the last ping's round trip to a connected stage, waiting included; 0 if none has come back."""
        ...

    def set_trust(self, certificates: Sequence[bytes]) -> None:
        """The certificates (DER) of the current roster's nodes; links to all others are cut at once."""
        ...

    def drop(self, peer: bytes) -> None:
        """Cut everything to and from `peer`, stage and head. The down callbacks are called."""
        ...

    def counts(self) -> LinkCounts: ...

    def close(self) -> None:
        """Cut everything and stop listening. No callback begins after it returns."""
        ...
