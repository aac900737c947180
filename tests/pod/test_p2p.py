"""What libp2p does not do by itself: each hazard has a test that fails when its remedy is taken away."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pod.control import MAX_PAYLOAD_BYTES, ControlError, RefusedError
from pod.identity import KeyPair, peer_id
from pod.membership import Membership
from pod.p2p.frames import ControlFrame, FrameError, FrameReader, FrameType, encode_frame
from pod.p2p.gate import HANDSHAKE_TIMEOUT_S, MAX_NUM_HANDSHAKES_AT_ONCE
from pod.p2p.host import Host
from pod.p2p.mdns import LanDiscovery
from pod.p2p.transport import LibP2PControl
from tests.pod.machines import Machines, play
from tests.pod.people import key_of
from tests.pod.waiting import until

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


async def echo(peer: bytes, payload: bytes) -> bytes:
    return payload


async def listening(name: str, *allowed: bytes, listen: str = LOOPBACK) -> LibP2PControl:
    transport = LibP2PControl(key_of(name), [listen])
    transport.set_allowed(frozenset(allowed), frozenset())
    transport.handle("echo", echo)
    await transport.start()
    return transport


def test_an_outsider_is_refused_in_the_handshake_before_any_stream() -> None:
    async def scenario() -> None:
        one = await listening("one")
        outsider = await listening("outsider", one.node_id)
        try:
            with pytest.raises(RefusedError, match="did not let this key in"):
                await outsider.connect(one.node_id, one.listen_addresses(), 5)
            thread = one._thread
            assert thread is not None
            host = thread._host
            assert host is not None
            assert host.gate.num_refused == 1
            assert not host._swarm.connections
        finally:
            await outsider.stop()
            await one.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize("spoken", [b"", b"\x13/multistream/1.0.0\n\x07/noise\n"])
def test_silent_outsiders_do_not_block_the_door_and_are_put_out(spoken: bytes) -> None:
    async def scenario() -> None:
        one = await listening("one", key_of("other").public)
        other = await listening("other", one.node_id)
        address = one.listen_addresses()[0]
        silent = []
        try:
            for _ in range(MAX_NUM_HANDSHAKES_AT_ONCE + 16):
                end = socket.create_connection(("127.0.0.1", int(address.split("/")[4])))
                end.sendall(spoken)
                end.setblocking(False)
                silent.append(end)
            started_s = time.monotonic()
            await other.connect(one.node_id, [address], 4)
            assert await other.request(one.node_id, "echo", b"x", 2) == b"x"
            assert time.monotonic() - started_s < HANDSHAKE_TIMEOUT_S - 1
            await until(lambda: all(map(is_closed, silent)), within_s=HANDSHAKE_TIMEOUT_S + 3)
        finally:
            for end in silent:
                end.close()
            await other.stop()
            await one.stop()

    asyncio.run(scenario())


def is_closed(end: socket.socket) -> bool:
    try:
        return end.recv(4096) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_an_address_where_another_node_answers_is_refused() -> None:
    async def scenario() -> None:
        one = await listening("one", key_of("other").public)
        other = await listening("other", one.node_id, key_of("third").public)
        try:
            address = one.listen_addresses()[0].partition("/p2p/")[0]
            with pytest.raises(ControlError, match="another node answers there"):
                await other.connect(key_of("third").public, [address], 5)
            with pytest.raises(ControlError, match="another node's"):
                await other.connect(key_of("third").public, one.listen_addresses(), 5)
        finally:
            await other.stop()
            await one.stop()

    asyncio.run(scenario())


def test_more_than_three_hundred_inbound_connections_in_a_hosts_life_are_accepted() -> None:
    async def scenario() -> None:
        one = await listening("one", key_of("other").public)
        other = await listening("other", one.node_id)
        address = one.listen_addresses()
        try:
            thread = one._thread
            assert thread is not None
            # Ended connections keep their slot: more of them than the limit, as after a long life.
            thread.call(lambda host: use_up(host, 3000))
            await other.connect(one.node_id, address, 5)
            assert await other.request(one.node_id, "echo", b"a", 5) == b"a"
            await other.disconnect(one.node_id)
            await other.connect(one.node_id, address, 5)
            host = thread._host
            assert host is not None
            assert host._swarm._inbound_limiter.borrowed_tokens == 3002
        finally:
            await other.stop()
            await one.stop()

    asyncio.run(scenario())


def use_up(host: Host, num_slots: int) -> None:
    for _ in range(num_slots):
        host._swarm._inbound_limiter.acquire_on_behalf_of_nowait(object())


def test_a_crash_of_the_libp2p_thread_restarts_it_on_the_same_port_and_nothing_else() -> None:
    async def scenario() -> None:
        one = await listening("one", key_of("other").public)
        other = await listening("other", one.node_id)
        addresses = one.listen_addresses()
        seen: list[bool] = []
        one.on_peer(lambda _, up: seen.append(up))
        try:
            await other.connect(one.node_id, addresses, 5)
            await until(lambda: seen == [True])
            one.crash(RuntimeError("as a bug in libp2p"))
            await until(lambda: seen == [True, False] and not other.peers())
            deadline = time.monotonic() + 5
            while not other.peers():
                assert time.monotonic() < deadline
                try:
                    await other.connect(one.node_id, addresses, 5)
                except ControlError:
                    await asyncio.sleep(0.05)
            assert await other.request(one.node_id, "echo", b"again", 5) == b"again"
        finally:
            await other.stop()
            await one.stop()
        assert "pod-p2p" not in {thread.name for thread in threading.enumerate()}

    asyncio.run(scenario())


def test_a_name_is_resolved_as_the_system_does_and_an_unknown_one_says_so() -> None:
    async def scenario() -> None:
        one = await listening("one", key_of("other").public)
        other = await listening("other", one.node_id)
        try:
            port = one.listen_addresses()[0].split("/")[4]
            with pytest.raises(ControlError, match=r"no-such-name\.invalid cannot be resolved"):
                await other.connect(one.node_id, ["/dns4/no-such-name.invalid/tcp/1"], 10)
            await other.connect(one.node_id, [f"/dns4/localhost/tcp/{port}"], 5)
            assert other.peers() == {one.node_id}
        finally:
            await other.stop()
            await one.stop()

    asyncio.run(scenario())


def test_a_taken_port_is_one_clear_line_although_libp2p_would_share_it() -> None:
    async def scenario() -> None:
        one = await listening("one")
        taken = one.listen_addresses()[0].partition("/p2p/")[0]
        try:
            with pytest.raises(ControlError, match=r"cannot listen on .* port \d+: the port is taken"):
                await listening("other", listen=taken)
        finally:
            await one.stop()

    asyncio.run(scenario())


def test_frames_pass_whole_however_the_bytes_are_cut() -> None:
    frames = [
        ControlFrame(FrameType.REQUEST, 7, "kind", b"payload"),
        ControlFrame(FrameType.ANSWER, 2**40, "", b""),
        ControlFrame(FrameType.REFUSAL, 0, "", "nö".encode()),
    ]
    data = b"".join(map(encode_frame, frames))
    for size in (1, 3, 14, len(data)):
        reader = FrameReader()
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        assert [frame for piece in pieces for frame in reader.feed(piece)] == frames


@pytest.mark.parametrize(
    "header",
    [
        struct.pack(">BBQI", 1, 4, 0, MAX_PAYLOAD_BYTES + 1),
        struct.pack(">BBQI", 1, 65, 0, 0),
        struct.pack(">BBQI", 9, 0, 0, 0),
        struct.pack(">BBQI", 1, 1, 0, 0) + b"\xff",
    ],
)
def test_an_oversize_or_unknown_frame_is_refused_at_its_header(header: bytes) -> None:
    with pytest.raises(FrameError):
        list(FrameReader().feed(header))


def test_a_peer_that_sends_no_frames_is_cut_off_and_the_host_goes_on() -> None:
    async def scenario() -> None:
        one = await listening("one", key_of("bad").public, key_of("good").public)
        bad = await listening("bad", one.node_id)
        good = await listening("good", one.node_id)
        try:
            await bad.connect(one.node_id, one.listen_addresses(), 5)
            thread = bad._thread
            assert thread is not None

            def spoil(host: Host) -> None:
                link = host.best_link(one.node_id)
                assert link is not None
                link._outbox.send_nowait(struct.pack(">BBQI", 1, 0, 0, 2**32 - 1))

            thread.call(spoil)
            await until(lambda: not bad.peers())
            await good.connect(one.node_id, one.listen_addresses(), 5)
            assert await good.request(one.node_id, "echo", b"a", 5) == b"a"
        finally:
            for transport in (bad, good, one):
                await transport.stop()

    asyncio.run(scenario())


@contextmanager
def process_of(home: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.pod.node_process", str(home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()


@pytest.mark.processes
def test_a_frozen_peer_is_noticed_within_four_seconds_a_killed_one_at_once(tmp_path: Path) -> None:
    async def scenario(machines: Machines) -> None:
        olga = await machines.create("olga")
        text = olga.invite().text()
        mark = await Membership.join(machines.home("mark"), text, "mark", "mark-pc")
        with process_of(machines.home("mark")) as process:
            await until(lambda: mark.node_id in olga.live(), within_s=15)
            os.kill(process.pid, signal.SIGSTOP)
            frozen_s = time.monotonic()
            await until(lambda: mark.node_id not in olga.live(), within_s=4)
            assert time.monotonic() - frozen_s > 1
            os.kill(process.pid, signal.SIGCONT)
            await until(lambda: mark.node_id in olga.live(), within_s=10)
            process.kill()
            await until(lambda: mark.node_id not in olga.live(), within_s=1)

    play(tmp_path, scenario)


@pytest.mark.processes
def test_an_idle_node_with_two_peers_uses_little_of_a_core(tmp_path: Path) -> None:
    async def scenario(machines: Machines) -> None:
        olga = await machines.create("olga")
        text = olga.invite().text()
        mark = await Membership.join(machines.home("mark"), text, "mark", "mark-pc")
        await machines.join("mira", olga.invite().text())
        with process_of(machines.home("mark")) as process:
            everybody = [olga, machines.running["mira"]]
            await until(lambda: all(mark.node_id in node.live() for node in everybody), within_s=15)
            share = await cpu_share(process.pid, over_s=6)
        print(f"idle CPU of a node with two peers: {share:.2%} of a core")
        assert share < 0.015

    play(tmp_path, scenario)


async def cpu_share(pid: int, over_s: float) -> float:
    """CPU seconds per second, measured over a stretch of real time."""
    process = psutil.Process(pid)
    await asyncio.sleep(1)
    before, began_s = sum(process.cpu_times()[:2]), time.monotonic()
    await asyncio.sleep(over_s)
    return (sum(process.cpu_times()[:2]) - before) / (time.monotonic() - began_s)


def test_nodes_of_one_pod_find_each_other_on_the_local_network() -> None:
    found: list[tuple[bytes, tuple[str, ...]]] = []
    heard = threading.Event()

    def on_found(node: bytes, addresses: tuple[str, ...]) -> None:
        found.append((node, addresses))
        heard.set()

    keys = [KeyPair.create() for _ in range(3)]
    addresses = [f"/ip4/192.0.2.{n}/tcp/4001/p2p/{peer_id(key.public)}" for n, key in enumerate(keys)]
    pods = (bytes(32), bytes(32), bytes(range(32)))
    ends = [
        LanDiscovery(
            pod, key.public, [address], on_found if key is keys[0] else lambda *_: None, ["127.0.0.1"]
        )
        for pod, key, address in zip(pods, keys, addresses, strict=True)
    ]
    try:
        for end in reversed(ends):
            end.start()
        assert heard.wait(10)
        assert set(found) <= {
            (key.public, (address,)) for key, address in zip(keys[:2], addresses[:2], strict=True)
        }
    finally:
        for end in ends:
            end.stop()


def test_four_use_one_invite_at_the_same_moment(tmp_path: Path) -> None:
    """They dial under one peer id, so each new link ends the one before: asking again must be enough."""

    async def scenario(machines: Machines) -> None:
        olga = await machines.create("olga")
        text = olga.invite(max_num_uses=4).text()
        await asyncio.gather(*(machines.join(f"joiner{n}", text) for n in range(4)))
        assert len(olga.roster.members) == 5

    play(tmp_path, scenario)
