"""A client that goes away: its generation is cancelled and settled at what was delivered, exactly once."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator

import pytest

from tests.gateway.conftest import RunningGateway, run_gateway, wait_until
from tests.gateway.fake_backend import KEY, MODEL, FakeBackend, Script, tokens_of


@pytest.fixture
def impatient() -> Iterator[RunningGateway]:
    """A gateway whose keep-alives come quickly."""
    yield from run_gateway(FakeBackend(), keep_alive_s=0.05)


def ask(gateway: RunningGateway, **more: object) -> socket.socket:
    """A raw connection with the request sent: nothing between the test and the socket's end."""
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **more}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=10)
    connection.sendall(head.encode() + body)
    return connection


def read_until(connection: socket.socket, wanted: bytes) -> bytes:
    data = b""
    while wanted not in data:
        piece = connection.recv(65536)
        assert piece, f"the stream ended before {wanted!r}: {data!r}"
        data += piece
    return data


def only_generation_is_settled(gateway: RunningGateway, num_tokens: int) -> None:
    wait_until("settled", lambda: bool(gateway.backend.generations[0].settlements))
    # The app answers again only after the loop has run everything of the first request.
    with ask(gateway) as connection:
        read_until(connection, b'"usage"')
    generation = gateway.backend.generations[0]
    assert generation.settlements == [num_tokens]
    assert generation.closed


def test_in_the_middle_of_a_stream(gateway: RunningGateway) -> None:
    gateway.backend.scripts.append(Script(tokens_of("Hello, world"), pause_at=5))
    with ask(gateway, stream=True) as connection:
        read_until(connection, b'"content":"o"')
    only_generation_is_settled(gateway, 5)


@pytest.mark.parametrize("num_read", range(1, 60, 3))
def test_what_is_settled_is_what_was_sent(gateway: RunningGateway, num_read: int) -> None:
    """A client that says it will send no more, and reads on to the end, has seen every token it pays for."""
    gateway.backend.scripts.append(Script(tokens_of("x" * 3000), is_paced=True))
    options = {"include_usage": True, "continuous_usage_stats": True}
    with ask(gateway, stream=True, stream_options=options, max_tokens=350) as connection:
        data = read_until(connection, b'"completion_tokens":%d,' % num_read)
        connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(65536):
            data += piece
    wait_until("settled", lambda: bool(gateway.backend.generations[0].settlements))
    counts = [int(number) for number in re.findall(rb'"completion_tokens":(\d+)', data)]
    assert gateway.backend.generations[0].settlements == [counts[-1]]


def test_tokens_that_never_became_text_were_not_delivered(gateway: RunningGateway) -> None:
    gateway.backend.scripts.append(Script(tokens_of("ab🌍"), pause_at=4))
    with ask(gateway, stream=True) as connection:
        read_until(connection, b'"content":"b"')
        wait_until("half a character", lambda: gateway.backend.generations[0].num_yielded == 4)
    only_generation_is_settled(gateway, 2)


def test_before_the_first_token(gateway: RunningGateway) -> None:
    gateway.backend.scripts.append(Script(pause_at=0))
    with ask(gateway, stream=True):
        wait_until("the generation is open", lambda: bool(gateway.backend.generations))
    only_generation_is_settled(gateway, 0)


def test_while_waiting_for_a_whole_answer(gateway: RunningGateway) -> None:
    gateway.backend.scripts.append(Script(tokens_of("Hello"), pause_at=3))
    with ask(gateway):
        wait_until("some tokens", lambda: [g.num_yielded for g in gateway.backend.generations] == [3])
    only_generation_is_settled(gateway, 3)


def test_while_waiting_for_a_route(gateway: RunningGateway) -> None:
    gateway.backend.open_hangs = True
    with ask(gateway, stream=True):
        wait_until("the node is asked", lambda: gateway.backend.num_pending == 1)
    wait_until("the wait was cancelled", lambda: gateway.backend.num_pending == 0)
    assert gateway.backend.generations == []


def test_long_waits_are_kept_alive(impatient: RunningGateway) -> None:
    script = Script(tokens_of("Hello"), pause_at=0)
    impatient.backend.scripts.append(script)
    with ask(impatient, stream=True) as connection:
        read_until(connection, b": keep-alive\n\n")
        impatient.call(script.go.set)
        read_until(connection, b"data: [DONE]")
    assert impatient.backend.generations[0].settlements == [6]


def test_a_stopping_node_settles_what_runs() -> None:
    backend = FakeBackend()
    backend.scripts.append(Script(tokens_of("Hello"), pause_at=2))
    running = run_gateway(backend)
    gateway = next(running)
    with ask(gateway, stream=True) as connection:
        read_until(connection, b'"content":"e"')
        assert next(running, None) is None
        assert backend.generations[0].settlements == [2]
