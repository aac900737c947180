"""What a stage does with receipts whose head vanishes, settles without them, or holds for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ledger.entry import HoldOpened, HoldVoided, ReceiptClaimed, VoidReason, decode_entry
from ledger.receipt import Receipt
from node.claims import HOLD_ARRIVES_S, MAX_NUM_UNCOVERED, PATIENCE_S, Claims
from node.ledger_thread import LedgerThread
from tests.ledger.world import World, raws, session_id


class Stage:
    """Node 1 with its claims; node 0 is the head of all sessions."""

    def __init__(self) -> None:
        self.world = World()
        self.now_s = 0.0
        self.head = self.world.ledger(0)
        self.ledger = self.world.ledger(1)
        self.thread = LedgerThread(self.ledger)
        self.claims = Claims(self.thread, lambda: self.now_s)

    def hold_receipt(self, number: int = 1, **changes: int) -> Receipt:
        receipt = self.world.receipt(session_id(number), **changes)
        self.claims.hold(self.world.co_signed(receipt).encode())
        return receipt

    def head_writes(self, *written: object) -> None:
        for body in written:
            self.head.append(body)  # type: ignore[arg-type]
        self.ledger.ingest(raws(self.head))

    def check(self) -> int:
        return asyncio.run(self.claims.check())

    def claimed(self) -> list[Receipt]:
        found = [decode_entry(raw).body for raw in raws(self.ledger)]
        return [body.receipt.receipt for body in found if isinstance(body, ReceiptClaimed)]


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    made.thread.close()


def hold(stage: Stage, number: int = 1) -> HoldOpened:
    return stage.world.hold(session_id(number))


def test_a_receipt_that_counts_is_forgotten(stage: Stage) -> None:
    receipt = stage.hold_receipt()
    stage.head_writes(hold(stage), stage.world.settlement(session_id(1), receipt))
    assert (stage.check(), stage.claims.num_held) == (0, 0)


def test_a_receipt_that_a_higher_one_covers_is_forgotten(stage: Stage) -> None:
    """The settlement may be here before the engine has told of its last receipt."""
    stage.hold_receipt(sequence=1, num_output_tokens=1)
    last = stage.world.receipt(session_id(1), sequence=2)
    stage.head_writes(hold(stage), stage.world.settlement(session_id(1), last))
    assert (stage.check(), stage.claims.num_held) == (0, 0)


def test_a_head_that_settles_without_the_receipt_is_claimed_against(stage: Stage) -> None:
    receipt = stage.hold_receipt()
    stage.head_writes(hold(stage), stage.world.settlement(session_id(1)))
    assert (stage.check(), stage.claims.num_held) == (1, 0)
    assert stage.claimed() == [receipt]
    assert stage.ledger.balance(stage.world.members[1]) > 0


def test_an_expired_hold_is_claimed_against_and_an_open_one_is_not_yet(stage: Stage) -> None:
    stage.hold_receipt()
    stage.head_writes(hold(stage))
    assert (stage.check(), stage.claims.num_held) == (0, 1)
    stage.world.clock.now_ms += 60_000
    assert (stage.check(), stage.claims.num_held) == (1, 0)


def test_a_hold_that_never_expires_is_claimed_against_when_the_session_must_be_over(stage: Stage) -> None:
    stage.hold_receipt()
    stage.head_writes(replace(hold(stage), expires_at_ms=stage.world.clock.now_ms + 10**12))
    stage.now_s = PATIENCE_S - 1
    assert (stage.check(), stage.claims.num_held) == (0, 1)
    stage.now_s = PATIENCE_S + 1
    assert (stage.check(), stage.claims.num_held) == (1, 0)


def test_without_any_hold_a_receipt_is_forgotten_after_the_deadline(stage: Stage) -> None:
    stage.hold_receipt()
    assert (stage.check(), stage.claims.num_held) == (0, 1)
    stage.now_s = PATIENCE_S + 1
    assert (stage.check(), stage.claims.num_held) == (0, 0)


def test_a_void_does_not_undo_what_was_signed(stage: Stage) -> None:
    """An honest head voids nothing that it signed for; one that does pays all the same."""
    receipt = stage.hold_receipt()
    stage.head_writes(hold(stage), HoldVoided(session_id(1), VoidReason.FAILED))
    assert (stage.check(), stage.claims.num_held) == (1, 0)
    assert stage.claimed() == [receipt]
    assert stage.ledger.balance(stage.world.members[0]) == -receipt.amount_microcredits
    assert sum(stage.ledger.balances().values()) == 0


def test_a_claim_that_is_refused_does_not_stop_the_others(stage: Stage) -> None:
    """The first head held for another key than its receipts name."""
    stage.hold_receipt(1)
    good = stage.hold_receipt(2)
    stage.head_writes(
        replace(hold(stage, 1), key_id=b"L" * 16),
        hold(stage, 2),
        stage.world.settlement(session_id(1)),
        stage.world.settlement(session_id(2)),
    )
    assert (stage.check(), stage.claimed()) == (1, [good])
    stage.now_s = PATIENCE_S + 1
    assert (stage.check(), stage.claims.num_held) == (0, 0)


def test_a_head_that_signs_without_a_hold_is_noticed_after_a_minute(stage: Stage) -> None:
    head = stage.world.nodes[0].public
    for number in range(MAX_NUM_UNCOVERED):
        stage.hold_receipt(number)
    stage.check()
    assert stage.claims.unpaying_heads == frozenset()
    stage.now_s += HOLD_ARRIVES_S + 1
    stage.check()
    assert stage.claims.unpaying_heads == frozenset({head})
    # They had only not arrived.
    stage.head_writes(*(hold(stage, number) for number in range(MAX_NUM_UNCOVERED)))
    stage.check()
    assert stage.claims.unpaying_heads == frozenset()


def test_holds_that_are_too_small_are_as_good_as_none_and_not_forgotten(stage: Stage) -> None:
    head = stage.world.nodes[0].public
    for number in range(MAX_NUM_UNCOVERED):
        stage.head_writes(replace(hold(stage, number), amount_microcredits=5))
        stage.hold_receipt(number)
    stage.now_s += PATIENCE_S + 1
    assert stage.check() == 0
    assert stage.claims.num_held == 0
    assert stage.claims.unpaying_heads == frozenset({head})
    stage.check()
    assert stage.claims.unpaying_heads == frozenset({head})


def test_a_head_that_pays_is_not_suspected_for_a_few_receipts(stage: Stage) -> None:
    for number in range(MAX_NUM_UNCOVERED - 1):
        stage.hold_receipt(number)
    for number in range(20, 40):
        receipt = stage.hold_receipt(number)
        stage.head_writes(hold(stage, number), stage.world.settlement(session_id(number), receipt))
    stage.now_s += HOLD_ARRIVES_S + 1
    stage.check()
    assert stage.claims.unpaying_heads == frozenset()
