"""How fast a stage link is: `python -m benchmarks.links` prints a Markdown table with ratios to plain TCP.

Two processes on loopback. One way of a 16 KiB hidden state, from a tensor to a tensor, one each millisecond
(both processes read one clock); round trip of one 16 KiB decode frame (there and back, on two links);
one-way bulk throughput of 4 MiB frames; the cost of connecting, and what an idle link costs. The plain TCP
column does the same with blocking sockets and no framing, in the same run. Does not cover real networks.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from node.links.frames import Dtype, Frame, HiddenBatch, HiddenItem, Lane
from node.links.tls_links import TlsLinks
from pod.identity import KeyPair, certificate

POD = bytes(32)
NEAR, FAR, THIRD = (KeyPair.of_seed(letter * 32) for letter in (b"n", b"f", b"t"))
SESSION = bytes(16)
DECODE_BYTES = 16 << 10
BULK_BYTES = 4 << 20
TIMEOUT_S = 10.0
PREFIX = struct.Struct("!II")
PAUSE_S = 0.001


def hidden(num_bytes: int, position: int = 1) -> HiddenBatch:
    return HiddenBatch(
        (HiddenItem(SESSION, position, 1),), Dtype.FLOAT32, num_bytes // 4, os.urandom(num_bytes)
    )


def hidden_of(rows_TD: Tensor, position: int) -> HiddenBatch:
    raw = rows_TD.view(torch.uint8).numpy().reshape(-1).data
    return HiddenBatch((HiddenItem(SESSION, position, 1),), Dtype.FLOAT32, rows_TD.shape[1], raw)


def now_us() -> int:
    """The same in all processes of this machine, in 32 bits."""
    return time.monotonic_ns() // 1000 % (1 << 32)


def links_of(key: KeyPair, on_frame: Callable[[bytes, Frame], None]) -> TlsLinks:
    links = TlsLinks(key, POD, "127.0.0.1:0", on_frame, lambda *_: None, lambda *_: None)
    links.set_trust([certificate(key) for key in (NEAR, FAR, THIRD)])
    return links


# -- the far process


def echo_frames(back_to: str) -> None:
    """Answers a decode frame with itself, and the last of a bulk transfer with a small decode frame.

    A frame with a time for its position is not answered; one at 0 is, with how long the others took.
    """
    ready = threading.Event()
    acknowledgement = hidden(64)
    times_us = array("I")

    def on_frame(peer: bytes, frame: Frame) -> None:
        assert isinstance(frame, HiddenBatch)
        position, size = frame.items[0].position, len(frame.rows)
        if size >= BULK_BYTES:
            if position == 0:
                links.send(peer, acknowledgement, Lane.DECODE)
        elif position == 1:
            links.send(peer, frame, Lane.DECODE)
        elif position:
            rows_TD = torch.frombuffer(frame.rows, dtype=torch.float32).view(1, -1)
            assert rows_TD.shape[1] * 4 == DECODE_BYTES
            times_us.append((now_us() - position) % (1 << 32))
        else:
            item = HiddenItem(SESSION, 0, 1)
            links.send(peer, HiddenBatch((item,), Dtype.FLOAT32, len(times_us), bytes(times_us)), Lane.DECODE)

    links = links_of(FAR, on_frame)
    links.connect(NEAR.public, back_to, TIMEOUT_S)
    print(links.data_address, flush=True)
    ready.wait(600)


def echo_bytes() -> None:
    """The same over plain TCP: a size, 1 or the time, and as many bytes. Size 0 asks for the times."""
    times_us = array("I")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
        while True:
            near, _ = listener.accept()
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while (prefix := PREFIX.unpack(receive(near, PREFIX.size)))[1] > 0:
                size, sent_us = prefix
                payload = receive(near, size)
                if size == 0:
                    near.sendall(times_us)
                elif sent_us == 1:
                    near.sendall(payload if size < BULK_BYTES else b"k")
                else:
                    times_us.append((now_us() - sent_us) % (1 << 32))


def receive(sock: socket.socket, num_bytes: int) -> bytearray:
    target = bytearray(num_bytes)
    view = memoryview(target)
    while view:
        num_new = sock.recv_into(view)
        if num_new == 0:
            return bytearray(num_bytes)
        view = view[num_new:]
    return target


@contextmanager
def far_process(*arguments: str) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-m", "benchmarks.links", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


# -- the measurements


def times_of(job: Callable[[], None], num_times: int) -> list[float]:
    """Seconds of each call, sorted, without the first tenth."""
    times = []
    for _ in range(num_times):
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return sorted(times[num_times // 10 :])


def paced(job: Callable[[], None], num_times: int) -> None:
    """As decode steps come: the other end sleeps in between."""
    for _ in range(num_times):
        job()
        time.sleep(PAUSE_S)


class Result:
    """Figures of one transport: latencies in microseconds, throughput in MB/s."""

    def __init__(
        self,
        one_way_us: list[int],
        round_trips: list[float],
        bulk_s: float,
        bulk_bytes: int,
        connects: list[float],
    ) -> None:
        one_way_us = sorted(one_way_us)
        self.one_way_p50_us = one_way_us[len(one_way_us) // 2]
        self.one_way_p99_us = one_way_us[int(len(one_way_us) * 0.99)]
        self.p50_us = statistics.median(round_trips) * 1e6
        self.p99_us = round_trips[int(len(round_trips) * 0.99)] * 1e6
        self.bulk_mb_per_s = bulk_bytes / bulk_s / 1e6
        self.connect_ms = statistics.median(connects) * 1e3


def measure_tcp(num_round_trips: int, num_bulk: int) -> Result:
    with far_process("echo-bytes") as (address, _):
        host, port = address.split(":")
        near = socket.create_connection((host, int(port)))
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        small, big = os.urandom(DECODE_BYTES), os.urandom(BULK_BYTES)

        def round_trip() -> None:
            near.sendall(PREFIX.pack(len(small), 1))
            near.sendall(small)
            receive(near, len(small))

        def one_way() -> None:
            near.sendall(PREFIX.pack(len(small), now_us()))
            near.sendall(small)

        round_trips = times_of(round_trip, num_round_trips)
        start = time.perf_counter()
        for _ in range(num_bulk):
            near.sendall(PREFIX.pack(len(big), 1))
            near.sendall(big)
        receive(near, num_bulk)
        bulk_s = time.perf_counter() - start
        paced(one_way, num_round_trips)
        near.sendall(PREFIX.pack(0, 1))
        times_us = array("I", receive(near, 4 * num_round_trips))
        near.close()
        connects = times_of(lambda: socket.create_connection((host, int(port))).close(), 20)
        return Result(times_us.tolist(), round_trips, bulk_s, num_bulk * BULK_BYTES, connects)


def measure_links(num_round_trips: int, num_bulk: int) -> tuple[Result, float]:
    answered = threading.Semaphore(0)
    times_us = array("I")

    def on_frame(_: bytes, frame: Frame) -> None:
        if isinstance(frame, HiddenBatch) and frame.items[0].position == 0:
            times_us.frombytes(frame.rows)
        answered.release()

    links = links_of(NEAR, on_frame)
    with far_process("echo-frames", links.data_address) as (address, _):
        links.connect(FAR.public, address, TIMEOUT_S)
        small, big, last = hidden(DECODE_BYTES), hidden(BULK_BYTES), hidden(BULK_BYTES, position=0)

        def round_trip() -> None:
            links.send(FAR.public, small, Lane.DECODE)
            assert answered.acquire(timeout=TIMEOUT_S)

        rows_TD = torch.randn(1, DECODE_BYTES // 4)

        def one_way() -> None:
            links.send(FAR.public, hidden_of(rows_TD, now_us()), Lane.DECODE)

        round_trips = times_of(round_trip, num_round_trips)
        start = time.perf_counter()
        for number in range(num_bulk):
            while not links.can_send_bulk(FAR.public):
                time.sleep(0.0005)
            links.send(FAR.public, last if number == num_bulk - 1 else big, Lane.BULK)
        assert answered.acquire(timeout=60)
        bulk_s = time.perf_counter() - start
        paced(one_way, num_round_trips)
        links.send(FAR.public, hidden(64, position=0), Lane.DECODE)
        assert answered.acquire(timeout=TIMEOUT_S)
        idle = idle_cpu_per_mille()
        connects = connect_times(address)
        links.close()
        return Result(times_us.tolist(), round_trips, bulk_s, num_bulk * BULK_BYTES, connects), idle


def connect_times(address: str, num_times: int = 20) -> list[float]:
    """Seconds to dial both lanes of a link, TLS and greeting included."""
    third = links_of(THIRD, lambda *_: None)

    def connect() -> None:
        third.drop(FAR.public)
        third.connect(FAR.public, address, TIMEOUT_S)

    times = times_of(connect, num_times)
    third.close()
    return times


def idle_cpu_per_mille(seconds: float = 4.0) -> float:
    before = time.process_time()
    time.sleep(seconds)
    return (time.process_time() - before) / seconds * 1000


def table(tcp: Result, links: Result, idle_per_mille: float) -> str:
    rows = [
        ("one way 16 KiB, tensor to tensor, p50 (us)", tcp.one_way_p50_us, links.one_way_p50_us),
        ("one way 16 KiB, tensor to tensor, p99 (us)", tcp.one_way_p99_us, links.one_way_p99_us),
        ("round trip 16 KiB, p50 (us)", tcp.p50_us, links.p50_us),
        ("round trip 16 KiB, p99 (us)", tcp.p99_us, links.p99_us),
        ("bulk one way (MB/s)", tcp.bulk_mb_per_s, links.bulk_mb_per_s),
        ("connect (ms; a link is two connections)", tcp.connect_ms, links.connect_ms),
    ]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    lines = [
        f"Stage links, loopback, {machine}",
        "",
        "| | plain TCP | stage link | ratio |",
        "|---|---|---|---|",
        *(f"| {name} | {plain:.1f} | {ours:.1f} | {ours / plain:.2f} |" for name, plain, ours in rows),
        f"| CPU of an idle link (per mille of a core) | | {idle_per_mille:.2f} | |",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Stage links against plain TCP on loopback.")
    parser.add_argument("role", nargs="?", choices=["echo-frames", "echo-bytes"], help=argparse.SUPPRESS)
    parser.add_argument("address", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--round-trips", type=int, default=3000)
    parser.add_argument("--bulk-frames", type=int, default=64, help="of 4 MiB each")
    arguments = parser.parse_args()
    # As the engine does: torch's own objects take long to look through.
    gc.freeze()
    if arguments.role == "echo-frames":
        echo_frames(arguments.address)
    elif arguments.role == "echo-bytes":
        echo_bytes()
    else:
        tcp = measure_tcp(arguments.round_trips, arguments.bulk_frames)
        links, idle_per_mille = measure_links(arguments.round_trips, arguments.bulk_frames)
        print(table(tcp, links, idle_per_mille))


if __name__ == "__main__":
    main()
