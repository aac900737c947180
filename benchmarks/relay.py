"""A slow network for one TCP address: one-way delay, jitter and a bandwidth cap, in a process of its own.

    python -m benchmarks.relay --listen 127.0.0.1:9001 --to 127.0.0.1:8422 \\
        --delay-ms 10 --jitter-ms 1 --mbit 100

prints the address it listens on, one line per `--listen`/`--to` pair (port 0: any free one), and runs until
its standard input ends or it is killed. From Python, always in its own process:

    with relayed("127.0.0.1:8422", Conditions(delay_s=0.010)) as address: ...

Both directions get the same unless `--back-delay-ms`, `--back-jitter-ms` or `--back-mbit` say otherwise
("back" is towards the one who dialled). A node is put behind it by a fixed port and the relay's address in
place of its own, for the stage links, the control links or both:

    pod up --data 127.0.0.1:8422 --advertise-data 127.0.0.1:9001
    pod up --listen 127.0.0.1:8421 --advertise-listen 127.0.0.1:9002

One relay in front of each of three stages is one delay per hop: a stage dials the next, a head dials all.

Every connection keeps its order and its half-closes; what is on its way is bounded, so a slow reader slows
its writer. Jitter is drawn per chunk from a generator seeded by (seed, connection, direction). The cap is
shared by all connections of one direction, chunk by chunk in turn. Knows nothing of what it carries.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

MAX_NUM_CONNECTIONS = 512
CONNECT_TIMEOUT_S = 10.0
_MAX_CHUNK_BYTES = 64 << 10
_MIN_CHUNK_BYTES = 1448
_CHUNK_S = 0.001
_MAX_WAITING_BYTES = 8 << 20
_PR_SET_TIMERSLACK = 29


@dataclass(frozen=True, slots=True)
class Conditions:
    """One direction. A chunk arrives `delay_s` after its last bit was sent, give or take up to `jitter_s`;
    `bytes_per_second` 0: no cap.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_second: float = 0.0


class Wire:
    """The capacity of one direction, shared by all its connections: who sends next begins when it is free."""

    def __init__(self, bytes_per_second: float) -> None:
        self._bytes_per_second = bytes_per_second
        self._free_s = 0.0
        self._lock = threading.Lock()

    def reserve(self, num_bytes: int, now_s: float) -> float:
        """When the last of these bytes will have been sent."""
        if not self._bytes_per_second:
            return now_s
        with self._lock:
            self._free_s = max(self._free_s, now_s) + num_bytes / self._bytes_per_second
            return self._free_s


class Pace:
    """When the chunks of one direction of one connection have been sent and when they arrive, in order."""

    def __init__(self, conditions: Conditions, wire: Wire, seed: str) -> None:
        self._conditions = conditions
        self._wire = wire
        self._random = random.Random(seed)
        self._last_due_s = 0.0

    def book(self, num_bytes: int, now_s: float) -> tuple[float, float]:
        """(sent, due): when the wire is free for the next chunk, and when this one is to be delivered."""
        sent_s = self._wire.reserve(num_bytes, now_s)
        jitter_s = self._conditions.jitter_s * self._random.uniform(-1.0, 1.0)
        due_s = sent_s + max(0.0, self._conditions.delay_s + jitter_s)
        self._last_due_s = max(self._last_due_s, due_s)
        return sent_s, self._last_due_s


class _Flow:
    """One direction of one connection: a thread reads and waits for the wire, another delivers in time."""

    def __init__(self, source: socket.socket, target: socket.socket, pace: Pace, chunk_bytes: int) -> None:
        self._source = source
        self._target = target
        self._pace = pace
        self._chunk_bytes = chunk_bytes
        self._changed = threading.Condition()
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._num_bytes = 0
        self._is_broken = False

    def read(self) -> None:
        """Until the source ends; an empty chunk stands for its end."""
        with suppress(OSError):
            while chunk := self._source.recv(self._chunk_bytes):
                sent_s, due_s = self._pace.book(len(chunk), time.monotonic())
                self._put(due_s, chunk)
                # Nobody may book the wire far ahead of the others.
                _sleep_until(sent_s)
            self._put(self._pace.book(0, time.monotonic())[1], b"")
            return
        self.break_off()

    def deliver(self) -> None:
        with suppress(OSError):
            while (chunk := self._take()) is not None:
                if not chunk:
                    self._target.shutdown(socket.SHUT_WR)
                    return
                self._target.sendall(chunk)
        self.break_off()

    def break_off(self) -> None:
        """A connection that fails on one side fails on the other; both threads of both flows see the end."""
        with self._changed:
            self._is_broken = True
            self._changed.notify_all()
        for sock in (self._source, self._target):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _put(self, due_s: float, chunk: bytes) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._num_bytes < _MAX_WAITING_BYTES or self._is_broken)
            self._waiting.append((due_s, chunk))
            self._num_bytes += len(chunk)
            self._changed.notify_all()

    def _take(self) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_broken)
            if self._is_broken:
                return None
            due_s, chunk = self._waiting[0]
        _sleep_until(due_s)
        with self._changed:
            self._waiting.popleft()
            self._num_bytes -= len(chunk)
            self._changed.notify_all()
        return chunk


class Relay:
    """Listens from the start; `serve` accepts until `close`. Raises OSError when it cannot be listened on."""

    def __init__(
        self, listen: str, to: str, there: Conditions, back: Conditions | None = None, seed: int = 0
    ) -> None:
        self._to = _split(to)
        self._conditions = (there, back or there)
        self._wires = tuple(Wire(conditions.bytes_per_second) for conditions in self._conditions)
        self._seed = seed
        self._room = threading.Semaphore(MAX_NUM_CONNECTIONS)
        self._listener = socket.create_server(_split(listen), backlog=128)

    @property
    def address(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"{host}:{port}"

    def serve(self) -> None:
        with suppress(OSError):
            for number in range(sys.maxsize):
                self._room.acquire()
                near, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(near, number), daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _connect(self, near: socket.socket, number: int) -> None:
        """Carries one connection from its first byte to its last."""
        try:
            far = socket.create_connection(self._to, CONNECT_TIMEOUT_S)
        except OSError:
            near.close()
            self._room.release()
            return
        far.settimeout(None)
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ends = ((near, far), (far, near))
        flows = [_Flow(*ends[way], self._pace(way, number), self._chunk_bytes(way)) for way in (0, 1)]
        jobs = [job for flow in flows for job in (flow.read, flow.deliver)]
        threads = [threading.Thread(target=job, daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        near.close()
        far.close()
        self._room.release()

    def _pace(self, way: int, number: int) -> Pace:
        return Pace(self._conditions[way], self._wires[way], f"{self._seed} {number} {way}")

    def _chunk_bytes(self, way: int) -> int:
        """What a capped wire carries in `_CHUNK_S`, so that one connection does not hold up the others."""
        num_bytes = int(self._conditions[way].bytes_per_second * _CHUNK_S) or _MAX_CHUNK_BYTES
        return min(max(num_bytes, _MIN_CHUNK_BYTES), _MAX_CHUNK_BYTES)


@contextmanager
def relayed(
    to: str, there: Conditions, back: Conditions | None = None, listen: str = "127.0.0.1:0", seed: int = 0
) -> Iterator[str]:
    """The address of a relay to `to` that runs in its own process until the end of the block."""
    command = [sys.executable, "-m", "benchmarks.relay", "--listen", listen, "--to", to, "--seed", str(seed)]
    for prefix, conditions in (("--", there), ("--back-", back or there)):
        command += [f"{prefix}delay-ms", repr(conditions.delay_s * 1e3)]
        command += [f"{prefix}jitter-ms", repr(conditions.jitter_s * 1e3)]
        command += [f"{prefix}mbit", repr(conditions.bytes_per_second * 8 / 1e6)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise OSError(f"the relay to {to} did not start")
        yield address
    finally:
        process.kill()
        process.communicate()


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _sleep_until(when_s: float) -> None:
    left_s = when_s - time.monotonic()
    if left_s > 0:
        time.sleep(left_s)


def _wake_sharply() -> None:
    """Linux lets a sleeper oversleep by 50 us so that wake-ups can be gathered; new threads inherit this."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)


def _conditions(delay_ms: float, jitter_ms: float, mbit: float) -> Conditions:
    return Conditions(delay_ms / 1e3, jitter_ms / 1e3, mbit * 1e6 / 8)


def main() -> None:
    parser = argparse.ArgumentParser(description="Relays TCP with delay, jitter and a bandwidth cap.")
    parser.add_argument("--listen", action="append", required=True, metavar="HOST:PORT")
    parser.add_argument("--to", action="append", required=True, metavar="HOST:PORT")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one way")
    parser.add_argument("--jitter-ms", type=float, default=0.0, help="at most, more or less than the delay")
    parser.add_argument("--mbit", type=float, default=0.0, help="0: no cap")
    parser.add_argument("--back-delay-ms", type=float)
    parser.add_argument("--back-jitter-ms", type=float)
    parser.add_argument("--back-mbit", type=float)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    if len(chosen.listen) != len(chosen.to):
        parser.error("each --listen needs a --to")
    there = (chosen.delay_ms, chosen.jitter_ms, chosen.mbit)
    back = (chosen.back_delay_ms, chosen.back_jitter_ms, chosen.back_mbit)
    both = [one if other is None else other for one, other in zip(there, back, strict=True)]
    _wake_sharply()
    for listen, to in zip(chosen.listen, chosen.to, strict=True):
        relay = Relay(listen, to, _conditions(*there), _conditions(*both), chosen.seed)
        threading.Thread(target=relay.serve, daemon=True).start()
        print(relay.address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
