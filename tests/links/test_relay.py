"""The emulated network: what it delays, caps and keeps, measured through its own process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.relay import Conditions, Pace, Wire, relayed

TIMEOUT_S = 20.0


@contextmanager
def listening() -> Iterator[tuple[socket.socket, str]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_S)
        yield listener, f"127.0.0.1:{listener.getsockname()[1]}"


def dial(address: str) -> socket.socket:
    host, port = address.split(":")
    sock = socket.create_connection((host, int(port)), TIMEOUT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def accept(listener: socket.socket) -> socket.socket:
    sock, _ = listener.accept()
    sock.settimeout(TIMEOUT_S)
    return sock


def read_all(sock: socket.socket) -> bytes:
    received = bytearray()
    while chunk := sock.recv(1 << 16):
        received += chunk
    return bytes(received)


def one_way_s(near: socket.socket, far: socket.socket, num_times: int = 5) -> float:
    """The least of some: both ends are in this process, so one clock serves."""
    times = []
    for number in range(num_times):
        start = time.monotonic()
        near.sendall(bytes([number]))
        assert far.recv(1) == bytes([number])
        times.append(time.monotonic() - start)
    return min(times)


def test_each_direction_has_its_own_delay() -> None:
    there, back = Conditions(delay_s=0.05), Conditions(delay_s=0.01)
    with (
        listening() as (listener, to),
        relayed(to, there, back) as address,
        dial(address) as near,
        accept(listener) as far,
    ):
        assert 0.05 <= one_way_s(near, far) < 0.075
        assert 0.01 <= one_way_s(far, near) < 0.035


def test_the_cap_is_kept_and_used_by_all_connections_together() -> None:
    num_bytes = 150_000
    capped = Conditions(bytes_per_second=1e6)
    with listening() as (listener, to), relayed(to, capped, Conditions()) as address:
        nears = [dial(address) for _ in range(2)]
        fars = [accept(listener) for _ in nears]
        start = time.monotonic()
        for near in nears:
            near.sendall(bytes(num_bytes))
            near.shutdown(socket.SHUT_WR)
        ends: list[float] = []
        readers = [
            threading.Thread(target=lambda far=far: (read_all(far), ends.append(time.monotonic() - start)))
            for far in fars
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(TIMEOUT_S)
        assert 0.29 <= max(ends) < 0.6
        # In turn, not one after the other.
        assert min(ends) > 0.7 * max(ends)
        for sock in (*nears, *fars):
            sock.close()


def test_data_and_half_closes_arrive_as_they_were_sent() -> None:
    data = b"".join(number.to_bytes(4, "big") for number in range(200_000))
    bumpy = Conditions(delay_s=0.002, jitter_s=0.002, bytes_per_second=20e6)
    with (
        listening() as (listener, to),
        relayed(to, bumpy) as address,
        dial(address) as near,
        accept(listener) as far,
    ):
        writer = threading.Thread(target=lambda: (near.sendall(data), near.shutdown(socket.SHUT_WR)))
        writer.start()
        assert read_all(far) == data
        writer.join()
        # The other direction is still open.
        far.sendall(b"answer")
        far.close()
        assert read_all(near) == b"answer"


def test_a_slow_reader_stops_its_writer() -> None:
    with (
        listening() as (listener, to),
        relayed(to, Conditions()) as address,
        dial(address) as near,
        accept(listener) as far,
    ):
        near.settimeout(0.5)
        num_sent = 0
        try:
            while num_sent < 256 << 20:
                num_sent += near.send(bytes(1 << 20))
        except TimeoutError:
            pass
        assert num_sent < 64 << 20
        near.settimeout(TIMEOUT_S)
        threading.Thread(target=near.shutdown, args=(socket.SHUT_WR,)).start()
        assert len(read_all(far)) == num_sent


def test_a_target_that_is_not_there_closes_the_connection() -> None:
    with listening() as (_, to):
        pass
    with relayed(to, Conditions()) as address, dial(address) as near:
        assert near.recv(1) == b""


chunks = st.lists(st.tuples(st.integers(1, 65536), st.floats(0, 0.01)), min_size=1, max_size=50)
conditions = st.builds(Conditions, st.floats(0, 0.1), st.floats(0, 0.2), st.just(0.0) | st.floats(1e4, 1e9))


@given(conditions, chunks, st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_the_pace_keeps_order_cap_and_seed(
    conditions: Conditions, chunks: list[tuple[int, float]], seed: int
) -> None:
    paces = [Pace(conditions, Wire(conditions.bytes_per_second), str(seed)) for _ in range(2)]
    now_s = last_due_s = num_bytes = 0.0
    for size, pause_s in chunks:
        now_s += pause_s
        sent_s, due_s = paces[0].book(size, now_s)
        assert paces[1].book(size, now_s) == (sent_s, due_s)
        num_bytes += size
        assert now_s <= sent_s <= due_s
        assert due_s >= last_due_s
        assert due_s <= max(last_due_s, sent_s + conditions.delay_s + conditions.jitter_s)
        if conditions.bytes_per_second:
            assert sent_s * conditions.bytes_per_second >= num_bytes * 0.999
        last_due_s = due_s
