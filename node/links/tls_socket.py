"""TLS over a plain socket, through buffers in memory: one system call for all that is to be written, and one
for all that has arrived, where OpenSSL on the socket itself makes one per record and two per record read.

For one thread at a time. Blocks, times out or does neither, as the socket is set. Knows no frames.
"""

from __future__ import annotations

import socket
import ssl
import time

# Key updates are answered in memory, where nobody has to read on.
_MAX_ANSWERS_BYTES = 64 << 10

Buffer = bytes | bytearray | memoryview


class TlsSocket:
    """Raises OSError from every call that uses the network; BlockingIOError where a wait would be needed."""

    def __init__(
        self, raw: socket.socket, context: ssl.SSLContext, server_side: bool, num_bytes: int
    ) -> None:
        """At most `num_bytes` are taken from the system at once, and kept room for."""
        self.raw = raw
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._arrived = memoryview(bytearray(num_bytes))
        self._unsent = memoryview(b"")

    def fileno(self) -> int:
        return self.raw.fileno()

    def handshake(self, deadline: float) -> bytes | None:
        """The peer's certificate. `deadline` is of the monotonic clock. Raises OSError."""
        while True:
            self._set_deadline(deadline)
            try:
                self._tls.do_handshake()
                self._send_all()
                return self._tls.getpeercert(binary_form=True)
            except ssl.SSLWantReadError:
                self._send_all()
                if not self._fill():
                    raise ConnectionResetError("closed by the peer") from None
            except ssl.SSLError:
                # What is wrong stands in an alert that the peer should see.
                self._send_all()
                raise

    def read_exactly(self, num_bytes: int, deadline: float) -> bytes:
        """That many bytes by `deadline`, fewer if the peer ends."""
        target = memoryview(bytearray(num_bytes))
        num_read = 0
        while num_read < num_bytes:
            self._set_deadline(deadline)
            num_new = self.recv_into(target[num_read:])
            if not num_new:
                break
            num_read += num_new
        return bytes(target[:num_read])

    def recv_into(self, target: memoryview) -> int:
        """At least one byte of at most one record; 0 at the end."""
        while True:
            try:
                return self._tls.read(len(target), target)  # type: ignore[return-value]
            except ssl.SSLWantReadError:
                if not self._fill():
                    return 0
            except ssl.SSLZeroReturnError:
                return 0

    def write(self, *buffers: Buffer) -> bool:
        """Encrypt all of it and hand it to the system; False when some of it has to wait for `flush`."""
        for buffer in buffers:
            self._tls.write(buffer)
        return self.flush()

    def flush(self) -> bool:
        """Whether nothing waits any more."""
        while self._unsent or self._outgoing.pending:
            if not self._unsent:
                self._unsent = memoryview(self._outgoing.read())
            try:
                num_sent = self.raw.send(self._unsent)
            except BlockingIOError:
                return False
            self._unsent = self._unsent[num_sent:]
        return True

    def shutdown(self) -> None:
        """End the connection from any thread. Touches nothing but the socket."""
        try:
            self.raw.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        self.raw.close()

    def _fill(self) -> int:
        if self._outgoing.pending > _MAX_ANSWERS_BYTES:
            raise ConnectionAbortedError("the peer makes TLS answer without end")
        num_bytes = self.raw.recv_into(self._arrived)
        self._incoming.write(self._arrived[:num_bytes])
        return num_bytes

    def _send_all(self) -> None:
        """On a blocking socket."""
        self.raw.sendall(self._outgoing.read())

    def _set_deadline(self, deadline: float) -> None:
        self.raw.settimeout(max(0.001, deadline - time.monotonic()))
