"""The TLS adapter against those it must not believe: outsiders, liars, the broken and the frozen."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from node.links.codec import WIRE_VERSION, encode
from node.links.frames import (
    Dtype,
    Frame,
    HiddenBatch,
    HiddenItem,
    Lane,
    Malformed,
    Ping,
    Pong,
    SessionOpened,
    StartSession,
    TokenBatch,
    TokenItem,
)
from node.links.hello import Direction, Hello, Role
from node.links.port import LinkDown, LinkFull
from node.links.trust import Trust
from pod.identity import KeyPair, certificate, key_pem
from tests.links.ends import (
    CERTIFICATES,
    KEYS,
    POD,
    ROSTER,
    SESSION,
    SMALL_LIMITS,
    TIMEOUT_S,
    StageEnd,
    TlsAdapter,
    connect,
    eventually,
    open_session,
    rows_frame,
)

A, B, C, OUTSIDER = KEYS[:4]
STAGE_HELLO = Hello(POD, Role.STAGE, Direction.TO_LISTENER, Lane.DECODE, b"l" * 16)
ASKING_HELLO = replace(STAGE_HELLO, role=Role.HEAD)
ANSWERING_HELLO = replace(ASKING_HELLO, direction=Direction.TO_DIALLER)


@pytest.fixture
def adapter() -> Iterator[TlsAdapter]:
    made = TlsAdapter(SMALL_LIMITS)
    yield made
    made.close()


def dial(stage: StageEnd, context: ssl.SSLContext, hello: bytes = b"") -> ssl.SSLSocket:
    host, port = stage.links.data_address.split(":")
    raw = socket.create_connection((host, int(port)), TIMEOUT_S)
    tls = context.wrap_socket(raw)
    if hello:
        tls.sendall(hello)
    return tls


def dial_as(key: KeyPair, stage: StageEnd, hello: Hello) -> ssl.SSLSocket:
    tls = dial(stage, Trust(key, ROSTER).dialling, hello.encode())
    assert tls.recv(1) == b"\0"
    return tls


def send_for_ever(stage: StageEnd, head: bytes) -> None:
    while True:
        stage.links.send_to_head(head, SessionOpened(SESSION, 0))


def is_closed(tls: socket.socket) -> bool:
    tls.settimeout(TIMEOUT_S)
    try:
        return tls.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def assert_still_works(stage: StageEnd, adapter: TlsAdapter) -> None:
    other = adapter.stage(C)
    connect(other, stage)
    other.links.send(stage.node, rows_frame(77), Lane.DECODE)
    eventually(lambda: 77 in stage.positions)


def test_an_outsider_fails_the_handshake(adapter: TlsAdapter) -> None:
    stage = adapter.stage(A)
    with pytest.raises(ssl.SSLError):
        dial(stage, Trust(OUTSIDER, ROSTER).dialling, STAGE_HELLO.encode()).recv(1)
    with pytest.raises(LinkDown, match="does not admit"):
        adapter.head(OUTSIDER).connect(stage)
    outsider = adapter.stage(OUTSIDER)
    with pytest.raises(LinkDown, match="does not admit"):
        connect(outsider, stage)
    with pytest.raises(LinkDown, match="certificate"):
        connect(stage, outsider)
    assert not stage.frames
    assert_still_works(stage, adapter)


def test_a_client_without_a_certificate_fails_the_handshake(adapter: TlsAdapter) -> None:
    stage = adapter.stage(A)
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
    with pytest.raises(ssl.SSLError):
        dial(stage, bare, STAGE_HELLO.encode()).recv(1)


def test_tls_1_2_is_refused(adapter: TlsAdapter) -> None:
    context = Trust(B, ROSTER).dialling
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        dial(adapter.stage(A), context)


def test_a_certificate_signed_by_a_node_of_the_roster_is_still_a_stranger(
    adapter: TlsAdapter, tmp_path: Path
) -> None:
    stage = adapter.stage(A)
    issuer = x509.load_der_x509_certificate(certificate(B))
    child = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "child")]))
        .issuer_name(issuer.subject)
        .public_key(OUTSIDER.private.public_key())
        .serial_number(7)
        .not_valid_before(datetime.datetime(2020, 1, 1))
        .not_valid_after(datetime.datetime(2090, 1, 1))
        .sign(B.private, None)
    )
    pem = tmp_path / "child.pem"
    pem.write_bytes(child.public_bytes(serialization.Encoding.PEM) + key_pem(OUTSIDER))
    context = Trust(OUTSIDER, ROSTER).dialling
    context.load_cert_chain(pem)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        dial(stage, context, STAGE_HELLO.encode()).recv(1)


def test_another_node_of_the_roster_than_the_one_dialled_is_refused(adapter: TlsAdapter) -> None:
    one, other = adapter.stage(A), adapter.stage(B)
    with pytest.raises(LinkDown, match="another node"):
        one.links.connect(C.public, other.links.data_address, TIMEOUT_S)
    head = adapter.head(C)
    with pytest.raises(LinkDown, match="another node"):
        head.connect_to(C.public, other.links.data_address)
    assert not one.downs


def test_a_removed_node_is_cut_within_a_second(adapter: TlsAdapter) -> None:
    one, removed = adapter.stage(A), adapter.stage(B)
    connect(one, removed)
    connect(removed, one)
    one.links.set_trust([ROSTER[0]])
    eventually(lambda: one.downs and removed.downs, timeout_s=1)
    assert one.downs == [(B.public, "no longer in the roster")]
    with pytest.raises(LinkDown):
        one.links.send(B.public, rows_frame(1), Lane.DECODE)
    with pytest.raises(LinkDown, match="does not admit"):
        connect(removed, one)


def test_a_certificate_that_is_no_use_shuts_out_its_own_node_only(adapter: TlsAdapter) -> None:
    one, other = adapter.stage(A), adapter.stage(B)
    one.links.set_trust([b"\x30\x03\x02\x01\x00", ROSTER[1], CERTIFICATES[4][:-1], ROSTER[2]])
    connect(one, other)
    assert Trust(A, [b"", *ROSTER]).nodes == {key.public for key in (A, B, C)}


def test_another_pod_is_refused_in_words(adapter: TlsAdapter) -> None:
    with pytest.raises(LinkDown, match="another pod"):
        connect(adapter.stage(A), adapter.stage(B, pod=b"q" * 32))


@pytest.mark.parametrize(
    "hello",
    [
        os.urandom(len(STAGE_HELLO.encode())),
        b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n" + b"x" * 64,
        STAGE_HELLO.encode()[:-1],
        replace(STAGE_HELLO, direction=Direction.TO_DIALLER).encode(),
        replace(ASKING_HELLO, lane=Lane.BULK).encode(),
    ],
    ids=["random", "http", "short", "stage-reads", "head-bulk"],
)
def test_a_wrong_greeting_is_not_answered(adapter: TlsAdapter, hello: bytes) -> None:
    stage = adapter.stage(A)
    assert is_closed(dial(stage, Trust(B, ROSTER).dialling, hello))
    assert_still_works(stage, adapter)


def test_what_is_not_tls_at_all_is_closed(adapter: TlsAdapter) -> None:
    stage = adapter.stage(A)
    host, port = stage.links.data_address.split(":")
    with socket.create_connection((host, int(port)), TIMEOUT_S) as raw:
        raw.sendall(b"\x00" * 4096)
        with suppress(ConnectionError):
            while raw.recv(64):  # An alert, perhaps; a timeout would fail the test.
                pass
    assert_still_works(stage, adapter)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 64,
        struct.pack("!BBII", WIRE_VERSION, 6, 2**32 - 1, 0) + b"x" * 64,
        struct.pack("!BBII", WIRE_VERSION, 6, 16, 2**32 - 1) + b"x" * 64,
        struct.pack("!BBII", WIRE_VERSION, 11, 2, 0) + b"\x81\xf5",
        encode(open_session(B.public))[0],
        encode(StartSession(SESSION))[0],
    ],
    ids=["noise", "header-4-GiB", "rows-4-GiB", "bad-header", "open-from-a-stage", "start-from-a-stage"],
)
def test_bytes_that_are_no_frame_end_that_link_and_cost_no_memory(
    adapter: TlsAdapter, garbage: bytes
) -> None:
    stage, bystander = adapter.stage(A), adapter.stage(C)
    connect(bystander, stage)
    liar = dial_as(B, stage, STAGE_HELLO)
    tracemalloc.start()
    try:
        liar.sendall(garbage)
        eventually(lambda: stage.downs)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert stage.downs[0][0] == B.public
    assert "not a frame" in stage.downs[0][1]
    assert is_closed(liar)
    bystander.links.send(stage.node, rows_frame(5), Lane.DECODE)
    eventually(lambda: stage.positions == [5])


def test_a_frame_cut_short_is_a_lost_link(adapter: TlsAdapter) -> None:
    stage = adapter.stage(A)
    peer = dial_as(B, stage, STAGE_HELLO)
    peer.sendall(b"".join(encode(rows_frame(1, 4096)))[:1000])
    peer.close()
    eventually(lambda: stage.downs)
    assert not stage.frames
    assert_still_works(stage, adapter)


@pytest.mark.parametrize("frame", [Ping(1), Pong(2), SessionOpened(SESSION, 0)])
def test_a_reader_may_say_nothing_but_the_pongs_it_is_asked_for(adapter: TlsAdapter, frame: Frame) -> None:
    stage = adapter.stage(A)
    asking = dial_as(B, stage, ANSWERING_HELLO)
    asking.sendall(encode(frame)[0])
    eventually(lambda: stage.head_downs)
    assert "nobody asked" in stage.head_downs[0][1]
    # Behind the stage's own ping.
    assert len(asking.recv(1 << 10)) == len(encode(Ping(1))[0])
    assert is_closed(asking)


def test_a_lane_cannot_be_opened_twice(adapter: TlsAdapter) -> None:
    stage = adapter.stage(A)
    first = dial_as(B, stage, STAGE_HELLO)
    second = dial(stage, Trust(B, ROSTER).dialling, STAGE_HELLO.encode())
    assert is_closed(second)
    first.sendall(b"".join(encode(rows_frame(3))))
    eventually(lambda: stage.positions == [3])


def test_a_peer_that_dials_anew_replaces_its_older_link(adapter: TlsAdapter) -> None:
    stage = adapter.stage(A)
    older = dial_as(B, stage, STAGE_HELLO)
    newer = dial_as(B, stage, replace(STAGE_HELLO, link=b"n" * 16))
    assert is_closed(older)
    assert stage.downs == [(B.public, "dialled anew")]
    newer.sendall(b"".join(encode(rows_frame(4))))
    eventually(lambda: stage.positions == [4])


def test_silent_connections_are_bounded_and_closed_by_the_deadline(adapter: TlsAdapter) -> None:
    stage = adapter.stage(A)
    host, port = stage.links.data_address.split(":")
    silent = [
        socket.create_connection((host, int(port)), TIMEOUT_S)
        for _ in range(SMALL_LIMITS.max_num_handshakes + 1)
    ]
    started = time.monotonic()
    assert is_closed(silent[0])
    assert time.monotonic() - started < SMALL_LIMITS.handshake_timeout_s
    assert all(is_closed(one) for one in silent[1:])
    assert_still_works(stage, adapter)
    for one in silent:
        one.close()


def test_silent_strangers_keep_no_node_out() -> None:
    adapter = TlsAdapter(replace(SMALL_LIMITS, handshake_timeout_s=60.0))
    try:
        stage = adapter.stage(A)
        host, port = stage.links.data_address.split(":")
        silent = [socket.create_connection((host, int(port)), TIMEOUT_S) for _ in range(40)]
        assert_still_works(stage, adapter)
        for one in silent:
            one.close()
    finally:
        adapter.close()


def test_only_nodes_of_the_roster_are_dialled(adapter: TlsAdapter) -> None:
    stage = adapter.stage(A)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(LinkDown, match="not in the roster"):
            stage.links.connect(OUTSIDER.public, address, TIMEOUT_S)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_false_address_does_not_hold_up_the_true_one(adapter: TlsAdapter) -> None:
    one, other = adapter.stage(A), adapter.stage(B)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"

        def dial_the_false_one() -> None:
            with suppress(LinkDown):
                one.links.connect(other.node, address, 1.0)

        false = threading.Thread(target=dial_the_false_one)
        false.start()
        held, _ = silent.accept()
        connect(one, other)
        assert false.is_alive()
        false.join()
        held.close()
    one.links.send(other.node, rows_frame(6), Lane.DECODE)
    eventually(lambda: other.positions == [6])
    assert not other.downs


def test_a_head_that_does_not_read_fills_its_queue_and_no_more() -> None:
    adapter = TlsAdapter(replace(SMALL_LIMITS, tick_s=60.0))
    try:
        stage = adapter.stage(A)
        deaf = dial_as(B, stage, ANSWERING_HELLO)
        with pytest.raises(LinkFull):
            send_for_ever(stage, B.public)
        kernel_bytes = 16 << 20
        sent_bytes = stage.links.counts().sent[SessionOpened].num_bytes
        assert sent_bytes < kernel_bytes + SMALL_LIMITS.max_num_queued_bytes[Lane.DECODE]
        deaf.close()
    finally:
        adapter.close()


def test_a_peer_that_answers_no_ping_is_down(adapter: TlsAdapter) -> None:
    stage = adapter.stage(A)
    mute = [dial_as(B, stage, ANSWERING_HELLO), dial_as(C, stage, STAGE_HELLO)]
    eventually(lambda: stage.head_downs and stage.downs)
    assert stage.head_downs == [(B.public, "no answer to pings")]
    assert stage.downs == [(C.public, "silent")]
    for tls in mute:
        tls.close()


def test_links_that_are_only_idle_stay_up(adapter: TlsAdapter) -> None:
    one, other, head = adapter.stage(A), adapter.stage(B), adapter.head(C)
    connect(one, other)
    head.connect(other)
    num_ticks = 2 * SMALL_LIMITS.max_num_silent_ticks
    time.sleep(num_ticks * SMALL_LIMITS.tick_s)
    one.links.send(other.node, rows_frame(1), Lane.DECODE)
    eventually(lambda: other.positions == [1])
    assert one.downs == other.downs == other.head_downs == head.lost == []


def test_a_frozen_process_is_noticed_by_stages_and_head_within_four_seconds() -> None:
    adapter = TlsAdapter()
    one, head = adapter.stage(A), adapter.head(C)
    stage = subprocess.Popen(
        [sys.executable, "-m", "tests.links.frozen_stage", one.links.data_address],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert stage.stdout is not None
        address = stage.stdout.readline().strip()
        one.links.connect(B.public, address, TIMEOUT_S)
        head.connect_to(B.public, address)
        stage.send_signal(signal.SIGSTOP)
        eventually(lambda: one.downs and head.lost, timeout_s=4)
        assert one.downs[0][0] == head.lost[0] == B.public
    finally:
        stage.kill()
        stage.wait()
        adapter.close()


def test_two_hundred_nodes_can_be_trusted_at_once() -> None:
    keys = [KeyPair.of_seed(number.to_bytes(32, "big")) for number in range(1, 201)]
    trust = Trust(A, [*map(certificate, keys), *CERTIFICATES])
    assert len(trust.nodes) == 200 + len(CERTIFICATES)


@pytest.mark.parametrize("role", list(Role))
def test_a_batch_that_cannot_be_names_its_sessions_and_the_link_stays(
    adapter: TlsAdapter, role: Role
) -> None:
    """Towards a stage rows of the wrong length; towards a head a reason to finish that there is not."""
    stage, other = adapter.stage(A), adapter.stage(B)
    if role is Role.STAGE:
        connect(other, stage)
        item = HiddenItem(SESSION, 4, 1)
        other.links.send(stage.node, HiddenBatch((item,), Dtype.INT8, 64, bytes(65)), Lane.DECODE)
        other.links.send(stage.node, rows_frame(9), Lane.DECODE)
        eventually(lambda: stage.positions == [9])
        assert isinstance(stage.frames[0][1], Malformed)
        assert stage.frames[0][1].sessions == (SESSION,)
        assert not stage.downs
        return
    head = adapter.head(C)
    head.connect(stage)
    item_of_no_kind = TokenItem(SESSION, 4, 17, 9)  # type: ignore[arg-type]
    stage.links.send_to_head(head.node, TokenBatch((item_of_no_kind,)))
    stage.links.send_to_head(head.node, SessionOpened(SESSION, 0))
    eventually(lambda: head.frames)
    assert head.lost == [stage.node]
    assert head.links.is_connected(stage.node)
    assert not stage.head_downs
