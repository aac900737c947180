"""What both adapters of the stage link port promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from node.links.codec import encode
from node.links.frames import (
    CloseSession,
    FinishReason,
    HiddenBatch,
    Lane,
    OpenSession,
    SessionOpened,
    TokenBatch,
    TokenItem,
)
from node.links.port import FrameCount, LinkDown, LinkFull
from tests.links.ends import (
    KEYS,
    ROSTER,
    SESSION,
    SMALL_LIMITS,
    Adapter,
    MemoryAdapter,
    StageEnd,
    TlsAdapter,
    closing,
    connect,
    eventually,
    open_session,
    rows_frame,
)

A, B, C = KEYS[:3]


@pytest.fixture(params=[MemoryAdapter, TlsAdapter], ids=["memory", "tls"])
def make(request: pytest.FixtureRequest) -> Callable[..., Adapter]:
    factory: Callable[..., Adapter] = request.param
    return factory


@pytest.fixture
def adapter(make: Callable[..., Adapter]) -> Iterator[Adapter]:
    with closing(make()) as made:
        yield made


@pytest.fixture
def small(make: Callable[..., Adapter]) -> Iterator[Adapter]:
    with closing(make(SMALL_LIMITS)) as made:
        yield made


def fill_bulk(source: StageEnd, target: StageEnd, max_num_frames: int) -> int:
    """Send 64 KiB frames until the queue stays full; returns how many went in."""
    for position in range(max_num_frames):
        try:
            eventually(lambda: source.links.can_send_bulk(target.node), timeout_s=1.5)
        except AssertionError:
            return position
        source.links.send(target.node, rows_frame(position, 64 << 10), Lane.BULK)
    return max_num_frames


def test_frames_arrive_in_order_on_each_lane_and_in_both_directions(adapter: Adapter) -> None:
    one, other = adapter.stage(A), adapter.stage(B)
    connect(one, other)
    connect(other, one)
    for position in range(200):
        one.links.send(other.node, rows_frame(position), Lane.DECODE)
        one.links.send(other.node, rows_frame(1000 + position, 40_000), Lane.BULK)
        other.links.send(one.node, rows_frame(5000 + position), Lane.DECODE)
    eventually(lambda: len(other.positions) == 400 and len(one.positions) == 200)
    assert [p for p in other.positions if p < 1000] == list(range(200))
    assert [p for p in other.positions if p >= 1000] == list(range(1000, 1200))
    assert one.positions == list(range(5000, 5200))
    assert {peer for peer, _ in other.frames} == {one.node}


def test_rows_arrive_as_they_were_sent(adapter: Adapter) -> None:
    one, other = adapter.stage(A), adapter.stage(B)
    connect(one, other)
    sent = rows_frame(7, 3 << 20)
    one.links.send(other.node, sent, Lane.BULK)
    eventually(lambda: other.frames)
    assert other.frames == [(one.node, sent)]


def test_connecting_twice_is_connecting_once(adapter: Adapter) -> None:
    one, other = adapter.stage(A), adapter.stage(B)
    connect(one, other)
    connect(one, other)
    one.links.send(other.node, rows_frame(1), Lane.DECODE)
    eventually(lambda: other.positions == [1])
    assert not one.downs
    assert not other.downs


def test_sending_without_a_link_is_link_down(adapter: Adapter) -> None:
    one = adapter.stage(A)
    with pytest.raises(LinkDown):
        one.links.send(B.public, rows_frame(1), Lane.DECODE)
    with pytest.raises(LinkDown):
        one.links.send_to_head(B.public, SessionOpened(SESSION, 0))
    assert not one.links.can_send_bulk(B.public)


def test_dialling_nobody_is_link_down(adapter: Adapter) -> None:
    one, other = adapter.stage(A), adapter.stage(B)
    other.links.close()
    with pytest.raises(LinkDown):
        connect(one, other)


def test_a_dropped_link_is_told_once_on_both_ends_and_can_be_made_again(adapter: Adapter) -> None:
    one, other = adapter.stage(A), adapter.stage(B)
    connect(one, other)
    one.links.drop(other.node)
    eventually(lambda: one.downs and other.downs)
    assert [peer for peer, _ in one.downs] == [other.node]
    assert [peer for peer, _ in other.downs] == [one.node]
    with pytest.raises(LinkDown):
        one.links.send(other.node, rows_frame(1), Lane.DECODE)
    connect(one, other)
    one.links.send(other.node, rows_frame(2), Lane.DECODE)
    eventually(lambda: other.positions == [2])
    assert len(one.downs) == len(other.downs) == 1


def test_a_stage_that_closes_is_noticed_by_those_it_sends_to_and_those_that_send_to_it(
    adapter: Adapter,
) -> None:
    before, closing_one, after = adapter.stage(A), adapter.stage(B), adapter.stage(C)
    connect(before, closing_one)
    connect(closing_one, after)
    closing_one.links.close()
    eventually(lambda: before.downs and after.downs)
    assert [peer for peer, _ in before.downs + after.downs] == [B.public, B.public]
    assert not closing_one.downs


def test_a_stage_restarted_under_the_same_id_can_be_dialled_and_dial(adapter: Adapter) -> None:
    one, first_life = adapter.stage(A), adapter.stage(B)
    connect(one, first_life)
    connect(first_life, one)
    first_life.links.close()
    eventually(lambda: one.downs)
    second_life = adapter.stage(B)
    connect(one, second_life)
    connect(second_life, one)
    one.links.send(B.public, rows_frame(1), Lane.DECODE)
    second_life.links.send(A.public, rows_frame(2), Lane.DECODE)
    eventually(lambda: second_life.positions == [1] and one.positions == [2])


def test_a_receiver_that_keeps_its_rows_bounds_the_sender_and_nothing_is_lost(small: Adapter) -> None:
    one, other = small.stage(A), small.stage(B)
    connect(one, other)
    num_sent = fill_bulk(one, other, max_num_frames=1000)
    held = SMALL_LIMITS.max_num_held_bytes[Lane.BULK] // (64 << 10)
    eventually(lambda: len(other.frames) == held)
    assert num_sent < 1000
    with pytest.raises(LinkFull):
        one.links.send(other.node, rows_frame(num_sent, 64 << 10), Lane.BULK)
    other.keep = False  # Which gives the rows back to the budget.
    other.frames.clear()
    eventually(lambda: len(other.positions) >= num_sent)
    assert other.positions[:num_sent] == list(range(num_sent))
    eventually(lambda: one.links.can_send_bulk(other.node))


def test_decode_frames_pass_a_bulk_lane_that_is_stuck(small: Adapter) -> None:
    one, other = small.stage(A), small.stage(B)
    connect(one, other)
    fill_bulk(one, other, max_num_frames=1000)
    assert not one.links.can_send_bulk(other.node)
    num_bulk = len(other.positions)
    for position in range(50_000, 50_020):
        one.links.send(other.node, rows_frame(position), Lane.DECODE)
    eventually(lambda: other.positions[num_bulk:] == list(range(50_000, 50_020)))


def test_every_frame_is_counted_by_type_with_its_bytes(adapter: Adapter) -> None:
    one, other = adapter.stage(A), adapter.stage(B)
    connect(one, other)
    tokens = TokenBatch((TokenItem(SESSION, 4, 17, FinishReason.NONE),))
    for _ in range(3):
        one.links.send(other.node, rows_frame(1, 4096), Lane.DECODE)
    one.links.send(other.node, tokens, Lane.DECODE)
    eventually(lambda: len(other.frames) == 4)
    hidden_bytes = sum(map(len, encode(rows_frame(1, 4096))))
    expected = {
        HiddenBatch: FrameCount(3, 3 * hidden_bytes),
        TokenBatch: FrameCount(1, len(encode(tokens)[0])),
    }
    assert one.links.counts().sent == expected
    assert other.links.counts().received == expected
    assert not one.links.counts().received


def test_a_head_asks_and_is_answered(adapter: Adapter) -> None:
    stage, head = adapter.stage(A), adapter.head(B)
    head.connect(stage)
    head.send(stage, open_session(head.node))
    eventually(lambda: stage.frames)
    assert stage.frames == [(head.node, open_session(head.node))]
    tokens = [TokenBatch((TokenItem(SESSION, n, n, FinishReason.NONE),)) for n in range(100)]
    stage.links.send_to_head(head.node, SessionOpened(SESSION, 0))
    for batch in tokens:
        stage.links.send_to_head(head.node, batch)
    eventually(lambda: len(head.frames) == 101)
    assert head.frames == [(stage.node, frame) for frame in [SessionOpened(SESSION, 0), *tokens]]


def test_a_node_that_is_head_and_stage_at_once_is_two_peers(adapter: Adapter) -> None:
    stage, neighbour, head = adapter.stage(A), adapter.stage(B), adapter.head(B)
    connect(stage, neighbour)
    head.connect(stage)
    stage.links.send_to_head(B.public, SessionOpened(SESSION, 0))
    stage.links.send(B.public, rows_frame(1), Lane.DECODE)
    eventually(lambda: head.frames and neighbour.frames)
    assert head.frames == [(stage.node, SessionOpened(SESSION, 0))]
    assert neighbour.positions == [1]
    head.close()
    eventually(lambda: stage.head_downs)
    stage.links.send(B.public, rows_frame(2), Lane.DECODE)
    eventually(lambda: neighbour.positions == [1, 2])
    assert not stage.downs


def test_head_and_stage_notice_each_other_going(adapter: Adapter) -> None:
    stage, other, head = adapter.stage(A), adapter.stage(C), adapter.head(B)
    head.connect(stage)
    head.connect(other)
    stage.links.close()
    eventually(lambda: head.lost == [stage.node])
    head.send(other, CloseSession(SESSION))
    eventually(lambda: other.frames)
    head.close()
    eventually(lambda: other.head_downs)
    assert [node for node, _ in other.head_downs] == [head.node]
    with pytest.raises(LinkDown):
        other.links.send_to_head(head.node, SessionOpened(SESSION, 0))


def test_a_removed_node_is_cut_and_not_let_in_again(adapter: Adapter) -> None:
    one, removed, head = adapter.stage(A), adapter.stage(B), adapter.head(B)
    connect(one, removed)
    head.connect(one)
    one.links.set_trust([ROSTER[0], ROSTER[2]])
    eventually(lambda: one.downs and removed.downs and one.head_downs and head.lost, timeout_s=1)
    with pytest.raises(LinkDown):
        connect(one, removed)
    with pytest.raises(LinkDown):
        connect(removed, one)
    with pytest.raises(LinkDown):
        head.connect(one)


def test_opened_sessions_reach_a_stage_with_their_prompt(adapter: Adapter) -> None:
    stage, head = adapter.stage(A), adapter.head(B)
    head.connect(stage)
    head.send(stage, open_session(head.node))
    eventually(lambda: stage.frames)
    frame = stage.frames[0][1]
    assert isinstance(frame, OpenSession)
    assert tuple(frame.prompt_ids) == (1, 2, 3)
