"""One TLS connection from either end: `Sender` writes frames and reads pongs, `Receiver` the reverse.

A TLS object is never used by two threads at once: a `Sender` guards its own with a lock and never waits
for the network, a `Receiver` belongs to one thread that does nothing but wait. Knows no other connections.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections import deque

from node.links.codec import PREFIX_BYTES, Buffer, FrameError, decode, encode, parse_prefix, received
from node.links.frames import Frame, Lane, Ping, Pong
from node.links.limits import LinkLimits
from node.links.port import LinkDown, LinkFull
from node.links.rows import RowsBudget
from node.links.tls_socket import TlsSocket

# Between two slices other connections get their turn; small enough not to hold a decode step up.
_SLICE_BYTES = 256 << 10
_PONG_BYTES = 4096
# A TLS record's worth: up to here one record with both costs less than one for the header, one for the rows.
_RECORD_BYTES = 16 << 10
_ROOM_POLL_S = 0.1


class _Wire:
    """The socket of a connection. Any thread may `abort`; only the owner closes."""

    def __init__(self, tls: TlsSocket, lane: Lane) -> None:
        self.lane = lane
        self.aborted = False
        self.num_silent_ticks = 0
        self._tls = tls
        self._closing = threading.Lock()

    def fileno(self) -> int:
        return self._tls.fileno()

    def abort(self) -> None:
        """End the connection at once: the owner's read or write fails. Does not touch the TLS object."""
        with self._closing:
            self.aborted = True
            if self._tls.fileno() >= 0:
                self._tls.shutdown()

    def close(self) -> None:
        with self._closing:
            self.aborted = True
            self._tls.close()


class Sender(_Wire):
    """Frames out, through a bounded queue; `service` is called by the one thread that watches the socket."""

    def __init__(self, tls: TlsSocket, lane: Lane, limits: LinkLimits, greeting: bytes = b"") -> None:
        """`greeting` is written before any frame."""
        super().__init__(tls, lane)
        tls.raw.setblocking(False)
        self._max_num_bytes = limits.max_num_queued_bytes[lane]
        self._num_bytes = 0
        self._waiting: deque[Buffer] = deque()
        self._queue = threading.Lock()
        self._writing = threading.Lock()
        self._has_unsent = False
        self._answer = bytearray()
        self._nonce = 0
        self._num_unanswered = 0
        self._pinged_s = 0.0
        self.round_trip_s = 0.0
        if greeting:
            self._enqueue([greeting], len(greeting))

    def has_room(self) -> bool:
        return self._num_bytes < self._max_num_bytes

    def push(self, buffers: list[Buffer]) -> bool:
        """Queue a frame; on the DECODE lane write it here and now if the socket takes it.

        Returns whether `service` has work left. Raises LinkFull and LinkDown.
        """
        if self.aborted:
            raise LinkDown("the link is closed")
        num_bytes = sum(map(len, buffers))
        if len(buffers) > 1 and num_bytes <= _RECORD_BYTES:
            buffers = [b"".join(buffers)]
        if self.lane is Lane.DECODE and num_bytes <= _SLICE_BYTES and self._writing.acquire(blocking=False):
            try:
                if not self._is_work_left():
                    self._has_unsent = not self._tls.write(*buffers)
                    return self._has_unsent
            except (OSError, ValueError) as error:
                raise LinkDown(_reason(error)) from error
            finally:
                self._writing.release()
        with self._queue:
            if self._num_bytes >= self._max_num_bytes:
                raise LinkFull(f"{self._num_bytes} bytes wait already")
            self._enqueue(buffers, num_bytes)
        return True

    def service(self) -> bool:
        """Read what was answered, write one slice. Returns whether more waits. Raises LinkDown."""
        with self._writing:
            try:
                self._read_pongs()
                self._write()
            except (OSError, ValueError, FrameError) as error:
                raise LinkDown(_reason(error)) from error
        return self._is_work_left()

    def ping(self) -> bool:
        """Called where `service` is, so no answer is read before this returns."""
        pinged_s = time.perf_counter()
        is_work_left = self.push(encode(Ping(self._nonce + 1)))
        self._nonce += 1
        self._num_unanswered += 1
        self._pinged_s = pinged_s
        return is_work_left

    def _enqueue(self, buffers: list[Buffer], num_bytes: int) -> None:
        self._num_bytes += num_bytes
        for buffer in buffers:
            if len(buffer) <= _SLICE_BYTES:
                self._waiting.append(buffer)
            else:
                view = memoryview(buffer).cast("B")
                self._waiting.extend(
                    view[start : start + _SLICE_BYTES] for start in range(0, len(view), _SLICE_BYTES)
                )

    def _is_work_left(self) -> bool:
        return self._has_unsent or bool(self._waiting)

    def _write(self) -> None:
        """About one slice's worth, in one write. What the system does not take comes first next time."""
        if self._has_unsent and not self._tls.flush():
            return
        self._has_unsent = False
        slices: list[Buffer] = []
        num_bytes = 0
        with self._queue:
            while self._waiting and num_bytes < _SLICE_BYTES:
                slices.append(self._waiting.popleft())
                num_bytes += len(slices[-1])
            self._num_bytes -= num_bytes
        if slices:
            self._has_unsent = not self._tls.write(*slices)

    def _read_pongs(self) -> None:
        answered = memoryview(bytearray(_PONG_BYTES))
        try:
            while num_bytes := self._tls.recv_into(answered):
                self._answer += answered[:num_bytes]
                self._take_pongs()
        except BlockingIOError:
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
            pong = decode(prefix, bytes(self._answer[PREFIX_BYTES:end]), b"")
            if pong != Pong(self._nonce - self._num_unanswered + 1):
                raise FrameError("the peer answers what nobody asked")
            if self._num_unanswered == 1:
                self.round_trip_s = time.perf_counter() - self._pinged_s
            del self._answer[:end]
            self._num_unanswered -= 1
            self.num_silent_ticks = 0


class Receiver(_Wire):
    """Frames in. `read` waits on the calling thread, which must be the only one to call it."""

    def __init__(
        self, tls: TlsSocket, lane: Lane, limits: LinkLimits, may_say: frozenset[type[Frame]]
    ) -> None:
        super().__init__(tls, lane)
        tls.raw.settimeout(None)
        self.is_waiting = False
        self._may_say = may_say
        self._budget = RowsBudget(limits.max_num_held_bytes[lane])
        # Of the record read last, what nobody has taken yet.
        self._record = memoryview(bytearray(_RECORD_BYTES))
        self._start = 0
        self._end = 0

    def read(self) -> tuple[Frame, int]:
        """The next frame and its encoded size; pings are answered on the way. Raises LinkDown, FrameError."""
        while True:
            frame, num_bytes = self._read_frame()
            if not isinstance(frame, Ping):
                return frame, num_bytes
            self.write(encode(Pong(frame.nonce))[0])

    def _read_frame(self) -> tuple[Frame, int]:
        prefix = parse_prefix(self._take(PREFIX_BYTES), self.lane)
        if prefix.frame_type not in self._may_say:
            raise FrameError(f"a {prefix.frame_type.__name__} has no place on this connection")
        header = bytes(self._take(prefix.header_bytes))
        payload: Buffer = b""
        if prefix.payload_bytes:
            self._wait_for_room(prefix.payload_bytes)
            payload = self._budget.take(prefix.payload_bytes)
            self._fill(memoryview(payload))
        frame = received(prefix, header, payload)
        return frame, PREFIX_BYTES + len(header) + len(payload)

    def _wait_for_room(self, num_bytes: int) -> None:
        while not self._budget.wait(num_bytes, _ROOM_POLL_S):
            if self.aborted:
                raise LinkDown("the link is closed")

    def _take(self, num_bytes: int) -> memoryview:
        """The next bytes, good until the next call."""
        start = self._start
        if start == self._end and num_bytes:
            start, self._end = 0, self._recv_into(self._record)
        if self._end - start >= num_bytes:
            self._start = start + num_bytes
            return self._record[start : self._start]
        self._start = start
        target = memoryview(bytearray(num_bytes))
        self._fill(target)
        return target

    def _fill(self, target: memoryview) -> None:
        """Straight into its memory, but for what came in one record with the frame's beginning."""
        num_read = min(len(target), self._end - self._start)
        target[:num_read] = self._record[self._start : self._start + num_read]
        self._start += num_read
        while num_read < len(target):
            num_read += self._recv_into(target[num_read:])

    def _recv_into(self, target: memoryview) -> int:
        self.is_waiting = True
        try:
            num_bytes = self._tls.recv_into(target)
        except (OSError, ValueError) as error:
            raise LinkDown(_reason(error)) from error
        if num_bytes == 0:
            raise LinkDown("closed by the peer")
        self.num_silent_ticks = 0
        self.is_waiting = False
        return num_bytes

    def write(self, raw: Buffer) -> None:
        try:
            self._tls.write(raw)
        except (OSError, ValueError) as error:
            raise LinkDown(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)
