"""Keeps replicas equal and knows who is alive. Once a second each pair of nodes exchanges the digests of all
channels; where they differ, the missing part is pulled in pieces. The same exchange is the heartbeat: a node
that is silent for three seconds is dead, whatever its TCP connection says. Knows no channel's content.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Protocol

from pod.canonical import DecodeError, Length, Name, decode, decode_record, encode, encode_record
from pod.control import ControlError, ControlTransport

BEAT_INTERVAL_S = 1.0
DEAD_AFTER_S = 3.0
TICK_S = 0.5
DEBOUNCE_S = 0.05
PULL_TIMEOUT_S = 10.0
# Hundreds of MiB: what is left then comes with the next heartbeat.
MAX_NUM_PIECES = 1024
# After bytes that make no sense.
NOT_ASKED_AGAIN_S = 30.0
MAX_PIECE_BYTES = 256 * 1024
MAX_SUMMARY_BYTES = 512 * 1024
MAX_NUM_CHANNELS = 16
DIGEST_BYTES = 8
# Up to this many peers everyone beats once a second; in larger pods less often, for the same total.
NUM_PEERS_AT_FULL_RATE = 32

log = logging.getLogger("pod.gossip")


class Replicated(Protocol):
    """Something every node holds a copy of. Same digest, same content."""

    @property
    def name(self) -> str: ...

    def digest(self) -> bytes: ...

    def summary(self) -> bytes:
        """What is here, short, for another node to find out what is missing."""

    def missing(self, summary: bytes) -> tuple[bytes, bool]:
        """A piece (256 KiB or a single record) of what the other lacks, and whether there is more."""

    async def ingest(self, peer: bytes, payload: bytes) -> int:
        """How much of it was new. Raises ValueError for bytes that make no sense."""


@dataclass(frozen=True, slots=True)
class _Pull:
    name: Name
    summary: Annotated[bytes, Length(0, MAX_SUMMARY_BYTES)]


class Gossip:
    """`is_member`: who is in the roster. Others, about to be cut off, may still read channel `open_name`."""

    def __init__(
        self,
        transport: ControlTransport,
        is_member: Callable[[bytes], bool],
        open_name: str,
        clock_s: Callable[[], float],
    ) -> None:
        self._transport = transport
        self._is_member = is_member
        self._open_name = open_name
        self._clock_s = clock_s
        self._channels: dict[str, Replicated] = {}
        self._pulling: dict[str, asyncio.Lock] = {}
        self._fruitless: dict[tuple[bytes, str], tuple[bytes, bytes]] = {}
        self._senseless_s: dict[tuple[bytes, str], float] = {}
        self._pulls: set[tuple[bytes, str]] = set()
        self._pending: dict[tuple[bytes, str], bytes] = {}
        self._heard_s: dict[bytes, float] = {}
        self._sent_s: dict[bytes, float] = {}
        self._live: set[bytes] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._push_due = False
        self._stopped = False
        self.on_live: Callable[[bytes, bool], None] = lambda node, live: None
        transport.handle("beat", self._on_beat)
        transport.handle("pull", self._on_pull)
        transport.on_peer(self._on_peer)

    def add(self, channel: Replicated) -> None:
        assert channel.name not in self._channels
        assert len(self._channels) < MAX_NUM_CHANNELS
        self._channels[channel.name] = channel
        self._pulling[channel.name] = asyncio.Lock()

    def live(self) -> frozenset[bytes]:
        return frozenset(self._live)

    def changed(self) -> None:
        """Some channel has news: tells everybody, at most once in 50 ms."""
        if not self._push_due and not self._stopped:
            self._push_due = True
            self._spawn(self._push())

    async def run(self) -> None:
        """Beats until cancelled."""
        previous_s = self._clock_s()
        while True:
            await asyncio.sleep(TICK_S)
            now_s = self._clock_s()
            self._forgive(now_s - previous_s - TICK_S)
            previous_s = now_s
            self._tick(now_s)

    async def stop(self) -> None:
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _forgive(self, late_s: float) -> None:
        """If this process itself stood still, the others' silence means nothing."""
        if late_s > TICK_S:
            self._heard_s = {peer: heard_s + late_s for peer, heard_s in self._heard_s.items()}

    def _tick(self, now_s: float) -> None:
        peers = self._transport.peers()
        slowdown = max(1.0, len(peers) / NUM_PEERS_AT_FULL_RATE)
        for peer in peers:
            if now_s - self._heard_s.setdefault(peer, now_s) > DEAD_AFTER_S * slowdown:
                log.info("%s is silent and counts as dead", peer.hex()[:8])
                self._set_live(peer, False)
                self._spawn(self._transport.disconnect(peer))
            elif self._transport.node_id < peer and self._due(peer, now_s, BEAT_INTERVAL_S * slowdown):
                # One of each pair asks, the other answers: both have heard each other.
                self._spawn(self._beat(peer))

    def _due(self, peer: bytes, now_s: float, interval_s: float) -> bool:
        return now_s - self._sent_s.get(peer, -interval_s) > interval_s - TICK_S / 2

    async def _push(self) -> None:
        await asyncio.sleep(DEBOUNCE_S)
        self._push_due = False
        await asyncio.gather(*(self._beat(peer) for peer in self._transport.peers()))

    async def _beat(self, peer: bytes) -> None:
        self._sent_s[peer] = self._clock_s()
        try:
            answer = await self._transport.request(peer, "beat", self._digests(peer), DEAD_AFTER_S)
            self._heard(peer, answer)
        except (ControlError, DecodeError) as error:
            log.debug("no heartbeat from %s: %s", peer.hex()[:8], error)

    async def _on_beat(self, peer: bytes, payload: bytes) -> bytes:
        self._heard(peer, payload)
        return self._digests(peer)

    def _digests(self, peer: bytes) -> bytes:
        names = self._channels if self._is_member(peer) else [self._open_name]
        return encode({name: self._channels[name].digest()[:DIGEST_BYTES] for name in names})

    def _heard(self, peer: bytes, payload: bytes) -> None:
        digests = decode(payload, 4096)
        if not isinstance(digests, dict):
            raise DecodeError("not a heartbeat")
        self._heard_s[peer] = self._clock_s()
        if self._is_member(peer):
            self._set_live(peer, True)
        for name, digest in digests.items():
            channel = self._channels.get(name)
            if (
                channel is not None
                and isinstance(digest, bytes)
                and self._worth_pulling(peer, channel, digest)
            ):
                self._want(peer, channel, digest)

    def _want(self, peer: bytes, channel: Replicated, digest: bytes) -> None:
        """One pull of a channel from a peer runs; of those asked for meanwhile the last follows."""
        key = (peer, channel.name)
        if key in self._pulls:
            self._pending[key] = digest
            return
        self._pulls.add(key)
        self._spawn(self._pull_all(peer, channel, digest))

    async def _pull_all(self, peer: bytes, channel: Replicated, digest: bytes) -> None:
        key = (peer, channel.name)
        wanted: bytes | None = digest
        try:
            while wanted is not None:
                await self._pull(peer, channel, wanted)
                wanted = self._pending.pop(key, None)
        finally:
            self._pulls.discard(key)
            self._pending.pop(key, None)

    def _worth_pulling(self, peer: bytes, channel: Replicated, digest: bytes) -> bool:
        key = (peer, channel.name)
        if self._clock_s() < self._senseless_s.get(key, -NOT_ASKED_AGAIN_S) + NOT_ASKED_AGAIN_S:
            return False
        own = channel.digest()[:DIGEST_BYTES]
        return own != digest and self._fruitless.get(key) != (own, digest)

    async def _pull(self, peer: bytes, channel: Replicated, digest: bytes) -> None:
        """One pull per channel at a time: after the first, the others are mostly needless."""
        any_new = False
        async with self._pulling[channel.name]:
            if not self._worth_pulling(peer, channel, digest):
                return
            for _ in range(MAX_NUM_PIECES):
                before = channel.summary()
                try:
                    num_new, more = await self._pull_piece(peer, channel, before)
                except (ControlError, ValueError) as error:
                    log.debug("cannot pull %s from %s: %s", channel.name, peer.hex()[:8], error)
                    if isinstance(error, ValueError):
                        self._senseless_s[peer, channel.name] = self._clock_s()
                    break
                any_new = any_new or num_new > 0
                # A piece of which everything is refused may still have told the channel what not to ask for.
                if not more or channel.summary() == before:
                    self._fruitless[peer, channel.name] = (channel.digest()[:DIGEST_BYTES], digest)
                    break
        if any_new:
            self.changed()

    async def _pull_piece(self, peer: bytes, channel: Replicated, summary: bytes) -> tuple[int, bool]:
        asked = encode_record(_Pull(channel.name, summary))
        answer = await self._transport.request(peer, "pull", asked, PULL_TIMEOUT_S)
        more, payload = answer[:1] == b"\x01", answer[1:]
        return await channel.ingest(peer, payload), more

    async def _on_pull(self, peer: bytes, payload: bytes) -> bytes:
        try:
            asked = decode_record(_Pull, payload, MAX_SUMMARY_BYTES + 1024)
        except DecodeError as error:
            raise ControlError(str(error)) from None
        channel = self._channels.get(asked.name)
        if channel is None or not (asked.name == self._open_name or self._is_member(peer)):
            raise ControlError(f"no channel {asked.name!r} here")
        piece, more = channel.missing(asked.summary)
        return (b"\x01" if more else b"\x00") + piece

    def _on_peer(self, peer: bytes, up: bool) -> None:
        if self._stopped:
            return
        if up:
            self._heard_s[peer] = self._clock_s()
            self._spawn(self._beat(peer))
            return
        self._set_live(peer, False)
        self._heard_s.pop(peer, None)
        self._sent_s.pop(peer, None)
        self._fruitless = {key: value for key, value in self._fruitless.items() if key[0] != peer}

    def _set_live(self, peer: bytes, live: bool) -> None:
        if live != (peer in self._live):
            (self._live.add if live else self._live.discard)(peer)
            self.on_live(peer, live)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
