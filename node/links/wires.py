"""One TLS connection from either end: `Sender` writes frames and reads pongs, `Receiver` the reverse.

An SSL object is never used by two threads at once: a `Sender` guards its own with a lock and never waits
for the network, a `Receiver` belongs to one thread that does nothing but wait. Knows no other connections.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections import deque

from node.links.codec import PREFIX_BYTES, Buffer, FrameError, decode, encode, parse_prefix
from node.links.frames import Frame, Lane, Ping, Pong
from node.links.limits import LinkLimits
from node.links.port import LinkDown, LinkFull
from node.links.rows import RowsBudget

# Between two slices other connections get their turn; small enough not to hold a decode step up.
_SLICE_BYTES = 256 << 10
_PONG_BYTES = 4096
# Up to here one copy costs less than writing the header on its own, which wakes the reader for nothing.
_JOIN_BYTES = 128 << 10
_ROOM_POLL_S = 0.1


class _Wire:
    """The socket of a connection. Any thread may `abort`; only the owner closes."""

    def __init__(self, tls: ssl.SSLSocket, lane: Lane) -> None:
        self.lane = lane
        self.aborted = False
        self.num_silent_ticks = 0
        self._tls = tls
        self._closing = threading.Lock()

    def fileno(self) -> int:
        return self._tls.fileno()

    def abort(self) -> None:
        """End the connection at once: the owner's read or write fails. Does not touch the SSL object."""
        with self._closing:
            self.aborted = True
            if self._tls.fileno() >= 0:
                try:
                    socket.socket.shutdown(self._tls, socket.SHUT_RDWR)
                except OSError:
                    return

    def close(self) -> None:
        with self._closing:
            self.aborted = True
            self._tls.close()


class Sender(_Wire):
    """Frames out, through a bounded queue; `service` is called by the one thread that watches the socket."""

    def __init__(self, tls: ssl.SSLSocket, lane: Lane, limits: LinkLimits, greeting: bytes = b"") -> None:
        """`greeting` is written before any frame."""
        super().__init__(tls, lane)
        tls.setblocking(False)
        self._max_num_bytes = limits.max_num_queued_bytes[lane]
        self._num_bytes = len(greeting)
        self._waiting: deque[memoryview] = deque(_slices(greeting))
        self._queue = threading.Lock()
        self._ssl = threading.Lock()
        self._answer = bytearray()
        self._nonce = 0
        self._num_unanswered = 0

    def has_room(self) -> bool:
        return self._num_bytes < self._max_num_bytes

    def push(self, buffers: list[Buffer]) -> bool:
        """Queue a frame; on the DECODE lane write it here and now if the socket takes it.

        Returns whether `service` has work left. Raises LinkFull and LinkDown.
        """
        num_bytes = sum(map(len, buffers))
        if num_bytes <= _JOIN_BYTES:
            buffers = [b"".join(buffers)]
        with self._queue:
            if self.aborted:
                raise LinkDown("the link is closed")
            if self._num_bytes >= self._max_num_bytes:
                raise LinkFull(f"{self._num_bytes} bytes wait already")
            self._num_bytes += num_bytes
            self._waiting.extend(slice_ for buffer in buffers for slice_ in _slices(buffer))
        if self.lane is Lane.DECODE and self._ssl.acquire(blocking=False):
            try:
                self._write()
            except (OSError, ValueError) as error:
                raise LinkDown(_reason(error)) from error
            finally:
                self._ssl.release()
        return bool(self._waiting)

    def service(self) -> bool:
        """Read what was answered, write one slice. Returns whether more waits. Raises LinkDown."""
        with self._ssl:
            try:
                self._read_pongs()
                return self._write()
            except (OSError, ValueError, FrameError) as error:
                raise LinkDown(_reason(error)) from error

    def ping(self) -> bool:
        self._nonce += 1
        self._num_unanswered += 1
        return self.push(encode(Ping(self._nonce)))

    def _write(self) -> bool:
        """Write up to one slice's worth. A slice the socket did not take is tried again unchanged."""
        room = _SLICE_BYTES
        while self._waiting and room > 0:
            slice_ = self._waiting[0]
            try:
                self._tls.send(slice_)
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                return True
            room -= len(slice_)
            with self._queue:
                self._waiting.popleft()
                self._num_bytes -= len(slice_)
        return bool(self._waiting)

    def _read_pongs(self) -> None:
        try:
            while answered := self._tls.recv(_PONG_BYTES):
                self._answer += answered
                self._take_pongs()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        raise LinkDown("closed by the peer")

    def _take_pongs(self) -> None:
        while len(self._answer) >= PREFIX_BYTES:
            prefix = parse_prefix(bytes(self._answer[:PREFIX_BYTES]), Lane.DECODE)
            if prefix.frame_type is not Pong or self._num_unanswered == 0:
                raise FrameError("the peer says something nobody asked for")
            end = PREFIX_BYTES + prefix.header_bytes
            if len(self._answer) < end:
                return
            decode(prefix, bytes(self._answer[PREFIX_BYTES:end]), b"")
            del self._answer[:end]
            self._num_unanswered -= 1
            self.num_silent_ticks = 0


class Receiver(_Wire):
    """Frames in. `read` waits on the calling thread, which must be the only one to call it."""

    def __init__(
        self, tls: ssl.SSLSocket, lane: Lane, limits: LinkLimits, may_say: frozenset[type[Frame]]
    ) -> None:
        super().__init__(tls, lane)
        tls.settimeout(None)
        self.is_waiting = False
        self._may_say = may_say
        self._budget = RowsBudget(limits.max_num_held_bytes[lane])

    def read(self) -> tuple[Frame, int]:
        """The next frame and its encoded size; pings are answered on the way. Raises LinkDown, FrameError."""
        while True:
            frame, num_bytes = self._read_frame()
            if not isinstance(frame, Ping):
                return frame, num_bytes
            self.write(encode(Pong(frame.nonce))[0])

    def _read_frame(self) -> tuple[Frame, int]:
        prefix = parse_prefix(self._read_exactly(bytearray(PREFIX_BYTES)), self.lane)
        if prefix.frame_type not in self._may_say:
            raise FrameError(f"a {prefix.frame_type.__name__} has no place on this connection")
        header = self._read_exactly(bytearray(prefix.header_bytes))
        payload: Buffer = b""
        if prefix.payload_bytes:
            self._wait_for_room(prefix.payload_bytes)
            payload = self._read_exactly(self._budget.take(prefix.payload_bytes))
        frame = decode(prefix, header, payload)
        return frame, PREFIX_BYTES + len(header) + len(payload)

    def _wait_for_room(self, num_bytes: int) -> None:
        while not self._budget.wait(num_bytes, _ROOM_POLL_S):
            if self.aborted:
                raise LinkDown("the link is closed")

    def _read_exactly(self, target: bytearray) -> bytearray:
        view = memoryview(target)
        num_read = 0
        self.is_waiting = True
        while num_read < len(target):
            try:
                num_new = self._tls.recv_into(view[num_read:])
            except (OSError, ValueError) as error:
                raise LinkDown(_reason(error)) from error
            if num_new == 0:
                raise LinkDown("closed by the peer")
            num_read += num_new
            self.num_silent_ticks = 0
        self.is_waiting = False
        return target

    def write(self, raw: Buffer) -> None:
        try:
            self._tls.sendall(raw)
        except (OSError, ValueError) as error:
            raise LinkDown(_reason(error)) from error


def read_exactly(tls: ssl.SSLSocket, num_bytes: int, deadline: float) -> bytes:
    """Exactly that many bytes by `deadline` (monotonic seconds), fewer if the peer ends. Raises OSError."""
    received = b""
    while len(received) < num_bytes:
        tls.settimeout(max(0.001, deadline - time.monotonic()))
        new = tls.recv(num_bytes - len(received))
        if not new:
            break
        received += new
    return received


def _slices(buffer: Buffer) -> list[memoryview]:
    view = memoryview(buffer).cast("B")
    return [view[start : start + _SLICE_BYTES] for start in range(0, len(view), _SLICE_BYTES)]


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)
