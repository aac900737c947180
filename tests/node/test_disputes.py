"""What a stage writes down against a head: with what the head signed, and never enough to fill a journal."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ledger.entry import Disputed, DisputeReason, decode_entry
from node.disputes import MAX_NUM_PER_HEAD, MAX_NUM_PER_WINDOW, WINDOW_S, Disputes
from node.engine.events import WorkDisputed
from node.engine.messages import LENGTH_BYTES, decode, encode
from node.ledger_thread import LedgerThread
from tests.ledger.world import World, raws, session_id


class Stage:
    """Node 1; nodes 0 and 2 are heads."""

    def __init__(self) -> None:
        self.world = World()
        self.now_s = 0.0
        self.ledger = self.world.ledger(1)
        self.thread = LedgerThread(self.ledger)
        self.disputes = Disputes(self.world.nodes[1].public, self.thread, lambda: self.now_s)

    def record(self, number: int, receipt: bytes, reason: DisputeReason = DisputeReason.COUNTS) -> bool:
        return asyncio.run(self.disputes.record(WorkDisputed(session_id(number), int(reason), receipt)))

    def signed(self, number: int, head: int = 0) -> bytes:
        return self.world.head_signed(self.world.receipt(session_id(number), head=head, payer=head)).encode()

    def written(self) -> list[Disputed]:
        found = [decode_entry(raw).body for raw in raws(self.ledger)]
        return [body for body in found if isinstance(body, Disputed)]


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    made.thread.close()


def test_a_dispute_is_in_the_books_of_all_and_moves_nothing(stage: Stage) -> None:
    head = stage.world.ledger(0)
    head.append(stage.world.hold(session_id(1)))
    stage.ledger.ingest(raws(head))
    assert stage.record(1, stage.signed(1))
    (dispute,) = stage.written()
    assert (dispute.session, dispute.reason) == (session_id(1), DisputeReason.COUNTS)
    assert dispute.receipt is not None
    assert dispute.receipt.receipt.head == stage.world.nodes[0].public
    head.ingest(raws(stage.ledger))
    for ledger in (head, stage.ledger):
        summary = ledger.session(stage.world.nodes[0].public, session_id(1))
        assert summary is not None
        assert (summary.num_disputes, summary.amount_microcredits) == (1, 0)
        assert set(ledger.balances().values()) == {0}


def test_what_the_head_did_not_sign_is_no_evidence(stage: Stage) -> None:
    forged = replace(stage.world.head_signed(stage.world.receipt(session_id(2))), head_signature=bytes(64))
    other_session, other_stage = stage.signed(9), stage.world.receipt(session_id(4), stage=2)
    for number, raw in (
        (1, b""),
        (2, forged.encode()),
        (3, other_session),
        (4, stage.world.head_signed(other_stage).encode()),
    ):
        assert stage.record(number, raw, DisputeReason.UNSIGNED_LIMIT)
    assert stage.written() == [
        Disputed(session_id(number), DisputeReason.UNSIGNED_LIMIT) for number in (1, 2, 3, 4)
    ]


def test_a_head_fills_no_journal(stage: Stage) -> None:
    for number in range(20):
        stage.record(number, stage.signed(number))
    assert len(stage.written()) == MAX_NUM_PER_HEAD
    # Another head's are written all the same.
    assert stage.record(20, stage.signed(20, head=2))
    assert stage.disputes.num_left_out == 20 - MAX_NUM_PER_HEAD
    stage.now_s = WINDOW_S
    assert stage.record(21, stage.signed(21))


def test_all_heads_together_fill_none_either(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.disputes.MAX_NUM_PER_HEAD", 1000)
    for number in range(MAX_NUM_PER_WINDOW + 5):
        stage.record(number, stage.signed(number, head=2 * (number % 2)))
    assert len(stage.written()) == MAX_NUM_PER_WINDOW


def test_a_ledger_that_refuses_stops_nothing(stage: Stage) -> None:
    """This node was removed while the engine still had sessions."""
    del stage.world.directory.members[stage.world.nodes[1].public]
    assert not stage.record(1, stage.signed(1))
    assert stage.written() == []


def test_a_dispute_travels_from_the_engine_to_its_node(stage: Stage) -> None:
    event = WorkDisputed(session_id(1), int(DisputeReason.TERMS), stage.signed(1))
    assert decode(encode(event)[LENGTH_BYTES:]) == event
