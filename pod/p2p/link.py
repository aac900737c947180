"""One framed control stream to one peer, on the trio side: a task that always reads and a task that writes
from a bounded queue. Neither is ever cancelled while the host runs, because in libp2p a cancelled read or
write breaks the connection; a link ends by closing its connection.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio
from libp2p.abc import INetStream

from pod.p2p.frames import ControlFrame, FrameError, FrameReader, encode_frame

MAX_NUM_QUEUED_FRAMES = 256
CLOSE_TIMEOUT_S = 1.0

log = logging.getLogger("pod.p2p")


class Link:
    """`on_frame` is called for every frame that arrives until the link is closed."""

    def __init__(
        self, peer: bytes, stream: INetStream, inbound: bool, on_frame: Callable[[Link, ControlFrame], None]
    ) -> None:
        self.peer = peer
        self.inbound = inbound
        self.closed = False
        self._stream = stream
        self._on_frame = on_frame
        self._outbox, self._to_write = trio.open_memory_channel[bytes](MAX_NUM_QUEUED_FRAMES)

    def send(self, frame: ControlFrame) -> bool:
        """False when the peer does not keep up or the link is gone."""
        try:
            self._outbox.send_nowait(encode_frame(frame))
        except (trio.WouldBlock, trio.ClosedResourceError, trio.BrokenResourceError):
            return False
        return True

    async def run(self) -> None:
        """Returns when the stream has ended, for whatever reason."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write_all)
            await self._read_all()
            await self.close()

    async def close(self) -> None:
        """Idempotent. Says goodbye if the peer takes it within a second, then closes the socket."""
        if self.closed:
            return
        self.closed = True
        self._outbox.close()
        connection = self._stream.swarm_conn
        with trio.move_on_after(CLOSE_TIMEOUT_S) as goodbye:
            await connection.close()
        if goodbye.cancelled_caught:
            await connection.muxed_conn.secured_conn.close()

    async def _read_all(self) -> None:
        reader = FrameReader()
        try:
            while not self.closed:
                data = await self._stream.read()
                if not data:
                    return
                for frame in reader.feed(data):
                    if not self.closed:
                        self._on_frame(self, frame)
        except FrameError as error:
            log.warning("a peer sent no valid frame: %s", error)
        except Exception as error:
            log.debug("the control stream ended: %r", error)

    async def _write_all(self) -> None:
        try:
            async for data in self._to_write:
                await self._stream.write(data)
        except Exception as error:
            log.debug("the control stream cannot be written: %r", error)
            await self.close()
