"""The newest plan wins everywhere, whoever hears of it first; nobody can plan in another's name."""

from __future__ import annotations

import asyncio
from pathlib import Path

import cbor2
import pytest

from node.placement.assignment import Assignment, Plan
from node.plan_book import PLAN_CONTEXT, PlanBook
from pod.identity import KeyPair

MODEL = bytes(32)
KEYS = sorted((KeyPair.of_seed(bytes([n]) * 32) for n in (1, 2)), key=lambda key: key.public)


def plan(epoch: int, key: KeyPair, end: int = 4) -> Plan:
    return Plan(epoch, key.public, (Assignment(MODEL, 0, end, key.public),))


def book(path: Path, *allowed: KeyPair) -> PlanBook:
    members = {key.public for key in allowed or KEYS}
    return PlanBook(path, lambda node: node in members, lambda: None)


def give(source: PlanBook, target: PlanBook) -> int:
    payload, more = source.missing(target.summary())
    assert not more
    return asyncio.run(target.ingest(b"peer", payload))


def test_the_higher_epoch_wins_and_equal_epochs_go_by_author(tmp_path: Path) -> None:
    low, high = KEYS
    one, two = book(tmp_path / "one"), book(tmp_path / "two")
    assert one.publish(plan(1, high), high.sign)
    assert two.publish(plan(1, low), low.sign)
    assert give(one, two) == 1
    assert give(two, one) == 0
    assert one.digest() == two.digest()
    assert two.plan == plan(1, high)
    assert two.publish(plan(2, low), low.sign)
    assert not one.publish(plan(1, high, 3), high.sign)
    assert give(two, one) == 1
    assert one.plan == plan(2, low)


def test_it_is_kept_on_disk(tmp_path: Path) -> None:
    assert book(tmp_path / "plan").publish(plan(3, KEYS[0]), KEYS[0].sign)
    assert book(tmp_path / "plan").plan == plan(3, KEYS[0])


def test_a_damaged_file_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "plan").write_bytes(b"\xff damaged")
    assert book(tmp_path / "plan").plan is None


@pytest.mark.parametrize("raw", [b"", b"\x00", b"\x82\x40\x40", cbor2.dumps([1, 2, 3])])
def test_bytes_that_are_no_plan_change_nothing(tmp_path: Path, raw: bytes) -> None:
    target = book(tmp_path / "plan")
    assert asyncio.run(target.ingest(b"peer", raw)) == 0
    assert target.plan is None


def test_a_strangers_and_a_forged_plan_are_refused(tmp_path: Path) -> None:
    honest, other = KEYS
    target = book(tmp_path / "plan", honest)
    stranger = plan(9, other).encode()
    signed = cbor2.dumps([stranger, other.sign(PLAN_CONTEXT + stranger)], canonical=True)
    assert asyncio.run(target.ingest(b"peer", signed)) == 0
    claimed = plan(9, honest).encode()
    forged = cbor2.dumps([claimed, other.sign(PLAN_CONTEXT + claimed)], canonical=True)
    assert asyncio.run(target.ingest(b"peer", forged)) == 0
    assert target.plan is None
