"""Every bound and deadline of the data plane in one value, so that a test can make them small."""

from __future__ import annotations

from dataclasses import dataclass, field

from node.links.frames import Lane


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """`queued` bounds what one lane to one peer may have waiting; `held` what its receiver keeps of rows.

    Both are met with at most one frame above them, so that the largest frame can pass a small bound.

    Liveness counts ticks of this process, not the clock: a process that was itself stopped or starved has
    ticked less, and does not blame its peers.
    """

    max_num_queued_bytes: dict[Lane, int] = field(
        default_factory=lambda: {Lane.DECODE: 32 << 20, Lane.BULK: 64 << 20}
    )
    max_num_held_bytes: dict[Lane, int] = field(
        default_factory=lambda: {Lane.DECODE: 64 << 20, Lane.BULK: 128 << 20}
    )
    max_num_connections: int = 1024
    max_num_handshakes: int = 32
    max_num_handshakes_per_address: int = 16
    handshake_timeout_s: float = 5.0
    tick_s: float = 0.5
    num_ticks_per_ping: int = 2
    max_num_silent_ticks: int = 5


DEFAULT_LIMITS = LinkLimits()
