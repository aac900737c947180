"""What a client may send: heads, bodies and how slowly, over real sockets, with what it costs the gateway."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import psutil
import pytest
from fastapi.routing import APIRoute

from node.dashboard.routes import router as dashboard_router
from node.gateway import body as body_module
from node.gateway import connection
from node.gateway.access import MAX_NUM_LOGIN_ATTEMPTS, Logins
from node.gateway.body import MAX_BODY_BYTES, BodyRoom
from node.gateway.connection import MAX_HEAD_BYTES, MAX_NUM_HEADERS, MAX_URL_BYTES
from node.gateway.errors import ApiError
from tests.gateway.conftest import RunningGateway, run_gateway
from tests.gateway.fake_backend import KEY, FakeBackend

QUICKLY_S = 5.0
GET = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n"
POST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    b"authorization: Bearer " + KEY.encode() + b"\r\n"
)


def dial(gateway: RunningGateway) -> socket.socket:
    return socket.create_connection(("127.0.0.1", gateway.port), timeout=QUICKLY_S)


def read_answer(sock: socket.socket) -> tuple[int, bytes]:
    """Status and whole answer of one response with a content-length."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += sock.recv(65536) or pytest.fail(f"closed after {received!r}")
    head, _, body = received.partition(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-len"))
    while len(body) < length:
        body += sock.recv(65536)
    return int(head.split()[1]), body


def is_closed(sock: socket.socket, within_s: float = QUICKLY_S) -> bool:
    sock.settimeout(within_s)
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningGateway]:
    """A gateway with short deadlines."""
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.5)
    monkeypatch.setattr(connection, "LINGER_S", 0.5)
    monkeypatch.setattr(connection, "CLOSE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(body_module, "BODY_TIMEOUT_S", 0.5)
    yield from run_gateway(FakeBackend())


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (GET + b"".join(b"x-%d: y\r\n" % n for n in range(MAX_NUM_HEADERS)) + b"\r\n", 431),
        (GET + b"x: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n", 431),
        (GET + b"x" * MAX_HEAD_BYTES, 431),
        (GET.replace(b"/healthz", b"/" + b"a" * MAX_URL_BYTES) + b"\r\n", 414),
        (b"not http at all\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), 400),
        (GET + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello", 400),
        (GET + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ],
    ids=["headers", "header", "name", "url", "words", "tls", "two lengths", "length and chunked"],
)
def test_heads_that_are_too_much_or_no_heads_at_all(
    hasty: RunningGateway, request_head: bytes, status: int
) -> None:
    with dial(hasty) as sock:
        sock.sendall(request_head)
        answered, body = read_answer(sock)
        assert answered == status
        assert json.loads(body)["error"]["message"]
        assert is_closed(sock)
    with dial(hasty) as sock:
        sock.sendall(GET + b"\r\n")
        assert read_answer(sock) == (200, b"ok\n")


def test_as_many_headers_as_are_allowed(gateway: RunningGateway) -> None:
    with dial(gateway) as sock:
        sock.sendall(GET + b"".join(b"x-%d: y\r\n" % n for n in range(MAX_NUM_HEADERS - 1)) + b"\r\n")
        assert read_answer(sock)[0] == 200


def test_a_flood_of_headers_costs_no_memory(gateway: RunningGateway) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    flood = b"x-flood: " + b"y" * 200 + b"\r\n"
    with ExitStack() as stack:
        socks = [stack.enter_context(dial(gateway)) for _ in range(20)]
        for sock in socks:
            try:
                sock.sendall(GET)
                for _ in range(100):
                    sock.sendall(flood * 100)
            except OSError:
                continue
        assert process.memory_info().rss - before < 64 * 1024 * 1024
    with dial(gateway) as sock:
        sock.sendall(GET + b"\r\n")
        assert read_answer(sock)[0] == 200


def test_a_head_that_comes_byte_by_byte_ends(hasty: RunningGateway) -> None:
    with dial(hasty) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nx: ")
        sock.settimeout(0.1)
        received, deadline_s = b"", time.monotonic() + QUICKLY_S
        while not received and time.monotonic() < deadline_s:
            sock.sendall(b"E")
            try:
                received = sock.recv(65536)
            except TimeoutError:
                continue
        assert received.startswith(b"HTTP/1.1 408 "), received


def test_a_connection_that_says_nothing_ends_without_a_word(hasty: RunningGateway) -> None:
    with dial(hasty) as sock:
        assert is_closed(sock)


def test_the_next_head_on_a_connection_has_its_deadline_too(hasty: RunningGateway) -> None:
    with dial(hasty) as sock:
        sock.sendall(GET + b"\r\n")
        assert read_answer(sock)[0] == 200
        sock.sendall(GET)
        assert read_answer(sock)[0] == 408
        assert is_closed(sock)


@pytest.mark.parametrize("framing", [b"content-length: 100\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n"])
def test_a_body_that_comes_too_slowly_ends(hasty: RunningGateway, framing: bytes) -> None:
    with dial(hasty) as sock:
        sock.sendall(POST + framing)
        sock.sendall(b"{" if b"length" in framing else b"1\r\n{\r\n")
        status, answer = read_answer(sock)
        assert status == 408
        assert b"did not arrive" in answer
        assert is_closed(sock)


def test_who_keeps_sending_after_the_answer_is_cut_off(hasty: RunningGateway) -> None:
    """A route that reads no body must not be a place where bodies are endless."""
    with dial(hasty) as sock:
        sock.sendall(GET + b"transfer-encoding: chunked\r\n\r\n")
        assert read_answer(sock)[0] == 200
        deadline_s, is_cut = time.monotonic() + QUICKLY_S, False
        while not is_cut and time.monotonic() < deadline_s:
            try:
                sock.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
                time.sleep(0.01)
            except OSError:
                is_cut = True
        assert is_cut


def test_ten_megabytes_are_refused_at_once_and_the_client_reads_why(gateway: RunningGateway) -> None:
    began_s = time.monotonic()
    with httpx.Client(base_url=gateway.url, timeout=QUICKLY_S) as client:
        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        large = b'{"model": "' + b"x" * 10_000_000 + b'"}'
        answer = client.post("/v1/chat/completions", content=large, headers=headers)
        assert answer.status_code == 413
        assert str(MAX_BODY_BYTES) in answer.json()["error"]["message"]

        def pieces() -> Iterator[bytes]:
            yield from (b"x" * 100_000 for _ in range(100))

        assert client.post("/v1/chat/completions", content=pieces(), headers=headers).status_code == 413
        # Without a key it is not even looked at.
        answer = client.post("/v1/chat/completions", content=large)
        assert answer.status_code == 401
        assert client.get("/healthz").status_code == 200
    assert time.monotonic() - began_s < QUICKLY_S


def test_trailers_do_not_become_headers_and_are_limited(gateway: RunningGateway) -> None:
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}).encode()
    chunked = POST + b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n" % (len(body), body)
    with dial(gateway) as sock:
        sock.sendall(chunked + b"host: evil\r\nx-forwarded-for: 1.2.3.4\r\n\r\n")
        assert read_answer(sock)[0] == 200
    with dial(gateway) as sock:
        sock.sendall(chunked)
        try:
            for _ in range(200):
                sock.sendall(b"x-flood: " + b"y" * 1000 + b"\r\n")
        except OSError:
            pass
        assert is_closed(sock)


def test_a_request_before_the_last_answer_is_not_taken(gateway: RunningGateway) -> None:
    """uvicorn would parse it ahead, and no longer see that the first one's client has gone."""
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}).encode()
    first = POST + b"content-length: %d\r\n\r\n%s" % (len(body), body)
    with dial(gateway) as sock:
        sock.sendall(first + GET + b"\r\n")
        assert read_answer(sock)[0] == 200
        assert is_closed(sock)


def test_bodies_that_are_on_their_way_have_room_together() -> None:
    room = BodyRoom(max_num_bytes=10)
    room.take(6)
    with pytest.raises(ApiError) as refused:
        room.take(5)
    assert refused.value.status == 503
    room.give_back(6)
    room.take(10)


def test_no_other_site_is_let_in(gateway: RunningGateway) -> None:
    """CORS is off: no answer names an origin, and a browser's preflight finds nothing."""
    foreign = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    with httpx.Client(base_url=gateway.url, timeout=QUICKLY_S) as client:
        preflight = client.options("/v1/chat/completions", headers=foreign)
        assert preflight.status_code == 405
        models = client.get("/v1/models", headers=foreign | {"authorization": f"Bearer {KEY}"})
        assert models.status_code == 200
        for answer in (preflight, models):
            assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_every_action_of_the_dashboard_is_refused_to_other_sites(gateway: RunningGateway) -> None:
    """Also those that somebody adds: the check is the router's, not theirs."""
    actions = [
        (method, route.path)
        for route in dashboard_router.routes
        if isinstance(route, APIRoute)
        for method in route.methods - {"GET", "HEAD"}
    ]
    assert ("POST", "/login") in actions
    own = f"http://127.0.0.1:{gateway.port}"
    with httpx.Client(base_url=gateway.url, timeout=QUICKLY_S) as client:
        for method, path in actions:
            for foreign in (
                {"origin": "https://evil.example"},
                {"origin": "null"},
                {"origin": own, "sec-fetch-site": "cross-site"},
                {"sec-fetch-site": "same-site"},
            ):
                answer = client.request(method, path, headers=foreign)
                assert answer.status_code == 403, (method, path, foreign)
        said = {"origin": own, "sec-fetch-site": "same-origin"}
        assert client.post("/login", data={"key": KEY}, headers=said).status_code == 303


def test_login_attempts_are_counted_by_network() -> None:
    """Whoever has one IPv6 address has 2^64 of them."""
    logins = Logins(FakeBackend(), now_s=lambda: 1000.0)
    for number in range(MAX_NUM_LOGIN_ATTEMPTS):
        logins.count_attempt(f"2001:db8::{number:x}")
    with pytest.raises(ApiError):
        logins.count_attempt("2001:db8::ffff")
    logins.count_attempt("2001:db8:0:1::1")
    for _ in range(MAX_NUM_LOGIN_ATTEMPTS):
        logins.count_attempt("::ffff:10.0.0.1")
    with pytest.raises(ApiError):
        logins.count_attempt("10.0.0.1")
    logins.count_attempt("10.0.0.2")
