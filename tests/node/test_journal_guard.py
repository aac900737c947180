"""When a node goes on with its journal and when it takes a new key, told by what others show it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import cast

import pytest

from ledger.entry import FIRST_PREV_HASH, Issued, sign_entry
from node import journal_guard
from node.journal_guard import JournalGuard, Verdict
from node.ledger_thread import LedgerThread
from pod.control import ControlError
from pod.membership import Membership
from tests.ledger.world import POD, START_MS, World, session_id


class FakeMembership:
    """`answers` is what each live node says of this node's journal; None: it does not answer."""

    def __init__(self, world: World, answers: Mapping[bytes, bytes | None]) -> None:
        self.node_id = world.nodes[0].public
        self.roster = SimpleNamespace(nodes={node.public: None for node in world.nodes})
        self._answers = answers

    def live(self) -> frozenset[bytes]:
        return frozenset(self._answers)

    async def request(self, node: bytes, kind: str, payload: bytes, timeout_s: float) -> bytes:
        assert (kind, payload) == (journal_guard.KIND, self.node_id)
        answer = self._answers[node]
        if answer is None:
            raise ControlError("no answer")
        return answer


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_guard, "GRACE_S", 0.05)
    monkeypatch.setattr(journal_guard, "AFTER_FIRST_S", 0.02)
    monkeypatch.setattr(journal_guard, "LOOK_EVERY_S", 0.001)


def verdict(world: World, answers: Mapping[bytes, bytes | None], is_old: bool = False) -> Verdict:
    thread = LedgerThread(world.ledger(0))
    thread.ledger.append(world.hold(session_id(1)))
    membership = cast(Membership, FakeMembership(world, answers))
    return asyncio.run(JournalGuard(membership, thread, is_old).decide())


def later_entry(world: World, signer: int = 0, author: int = 0) -> bytes:
    """At a place where this node's own journal holds another one."""
    node = world.nodes[author].public
    sign = world.nodes[signer].sign
    return sign_entry(POD, node, 0, FIRST_PREV_HASH, START_MS + 5, Issued(5), sign).raw


@pytest.fixture
def world() -> World:
    return World()


def test_who_is_alone_or_hears_nothing_goes_on(world: World) -> None:
    assert verdict(world, {}) is Verdict.CONTINUE
    assert verdict(world, {world.nodes[1].public: None}) is Verdict.CONTINUE
    assert verdict(world, {world.nodes[1].public: b""}) is Verdict.CONTINUE


def test_an_entry_of_ones_own_that_is_not_here_is_proof(world: World) -> None:
    one, other = world.nodes[1].public, world.nodes[2].public
    assert verdict(world, {one: b"", other: later_entry(world)}) is Verdict.RENEW


def test_nobody_can_make_a_node_change_its_key_with_less(world: World) -> None:
    peer = world.nodes[1].public
    for answer in (b"noise", later_entry(world, signer=1), later_entry(world, signer=1, author=1)):
        assert verdict(world, {peer: answer}) is Verdict.CONTINUE


def test_a_restored_node_needs_no_proof(world: World) -> None:
    assert verdict(world, {}, is_old=True) is Verdict.RENEW


def test_a_frozen_node_takes_a_new_key(world: World) -> None:
    thread = LedgerThread(world.ledger(0))
    thread.ledger.append(world.hold(session_id(1)))
    assert thread.ledger.ingest([later_entry(world)]).forks
    membership = cast(Membership, FakeMembership(world, {}))
    assert asyncio.run(JournalGuard(membership, thread, False).decide()) is Verdict.RENEW


def test_own_entries_that_came_by_sync_are_proof_too(world: World) -> None:
    """They may not be all there are: others could be at a node that is off."""
    before = world.ledger(0)
    first = before.append(world.hold(session_id(1)))
    second = before.append(world.hold(session_id(2)))
    thread = LedgerThread(world.ledger(0))
    thread.ledger.ingest([first.raw])
    guard = JournalGuard(cast(Membership, FakeMembership(world, {})), thread, False)
    thread.ledger.ingest([second.raw])
    assert asyncio.run(guard.decide()) is Verdict.RENEW
