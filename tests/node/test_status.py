"""Adverts carry the status as hostile bytes: what a node writes comes back, anything else is refused."""

from __future__ import annotations

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.speed import MAX_US, NO_HEAD, Speed
from node.status import MAX_NUM_SHARDS, MAX_NUM_SPEEDS, MAX_RTT_US, NodeStatus, ShardStatus, StatusError

texts = st.text(max_size=40)
counts = st.integers(0, 2**40)
ids = st.binary(min_size=32, max_size=32)


@st.composite
def shards(draw: st.DrawFn) -> ShardStatus:
    start = draw(st.integers(0, 100))
    return ShardStatus(
        draw(ids),
        start,
        start + draw(st.integers(1, 50)),
        draw(st.integers(0, 1000)),
        draw(counts),
        draw(counts),
    )


times = st.integers(1, MAX_US)
three_times = st.tuples(times, times, times)
speeds = st.builds(Speed, three_times, st.tuples(times, times), three_times | st.just(NO_HEAD))
statuses = st.builds(
    NodeStatus,
    serving=st.booleans(),
    starting=st.booleans(),
    device=texts,
    memory_bytes=counts,
    bytes_per_second=counts,
    data_address=texts,
    api_url=texts,
    software=texts,
    shards=st.lists(shards(), max_size=3).map(tuple),
    models_available=st.lists(ids, max_size=3).map(tuple),
    problems=st.lists(st.tuples(ids, texts), max_size=3).map(tuple),
    speeds=st.dictionaries(ids, speeds, max_size=3).map(lambda known: tuple(known.items())),
    link_rtt_us=st.integers(0, MAX_RTT_US),
)
SPEED = [bytes(32), [1, 2, 3], [4, 5], [0, 0, 0]]


@given(statuses)
def test_what_is_written_is_read(status: NodeStatus) -> None:
    assert NodeStatus.decode(status.encode()) == status


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(StatusError):
        NodeStatus.decode(raw)


def _fields(status: NodeStatus) -> list[object]:
    fields = cbor2.loads(status.encode())
    assert isinstance(fields, list)
    return fields


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0, 99),
        (1, 1),
        (2, 1),
        (3, b"cpu"),
        (3, "x" * 300),
        (4, -1),
        (4, True),
        (4, 1.5),
        (9, [[b"short", 0, 1, 0, 0, 0]]),
        (9, [[bytes(32), 5, 5, 0, 0, 0]]),
        (9, [[bytes(32), 0, 1, 1001, 0, 0]]),
        (9, [[bytes(32), 0, 1, 0, 0, 0]] * (MAX_NUM_SHARDS + 1)),
        (10, [b"short"]),
        (11, [[bytes(32)]]),
        (12, [SPEED, SPEED]),
        (12, [[n.to_bytes(32, "big"), *SPEED[1:]] for n in range(MAX_NUM_SPEEDS + 1)]),
        (12, [[bytes(31), *SPEED[1:]]]),
        (12, [SPEED[:3]]),
        (12, [[bytes(32), [0, 2, 3], [4, 5], [0, 0, 0]]]),
        (12, [[bytes(32), [1, 2], [4, 5], [0, 0, 0]]]),
        (12, [[bytes(32), [1, 2, 3], [4, 5, 6], [0, 0, 0]]]),
        (12, [[bytes(32), [1, 2, 3], [4, MAX_US + 1], [0, 0, 0]]]),
        (12, [[bytes(32), [1, 2, 3], [4, -5], [0, 0, 0]]]),
        (12, [[bytes(32), [1, 2, 3], [4, 1.5], [0, 0, 0]]]),
        (12, [[bytes(32), [1, 2, 3], [4, True], [0, 0, 0]]]),
        (12, [[bytes(32), [1, 2, 3], [4, 5], [0, 0, 1]]]),
        (12, [[bytes(32), [1, 2, 3], [4, 5], []]]),
        (12, [[bytes(32), "123", [4, 5], [0, 0, 0]]]),
        (13, -1),
        (13, MAX_RTT_US + 1),
        (13, "1"),
    ],
)
def test_a_wrong_field_is_refused(index: int, value: object) -> None:
    fields = _fields(NodeStatus(True, False, "cpu", 1, 1, "a:1", "", "0"))
    fields[index] = value
    with pytest.raises(StatusError):
        NodeStatus.decode(cbor2.dumps(fields, canonical=True))


def test_a_speed_is_read() -> None:
    fields = _fields(NodeStatus(True, False, "cpu", 1, 1, "a:1", "", "0"))
    fields[12] = [SPEED]
    status = NodeStatus.decode(cbor2.dumps(fields, canonical=True))
    assert status.speeds == ((bytes(32), Speed((1, 2, 3), (4, 5))),)
