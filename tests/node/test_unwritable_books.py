"""A database that takes nothing: requests end with one clear line, and no hold is left behind."""

from __future__ import annotations

import asyncio
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest

from ledger.journal import JournalError
from ledger.memory_journal import MemoryJournal
from node.errors import UserError
from node.gateway.backend import GenerationFailed
from node.ledger_thread import LedgerThread
from node.runtime import NodeRuntime
from node.sessions.holds import Holds
from tests.ledger.world import World, session_id


def test_a_request_that_cannot_be_written_down_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: MemoryJournal, records: object) -> None:
        raise JournalError("the ledger's database: /secret/path is full")

    world = World()
    terms: Any = SimpleNamespace(session=session_id(1), hold=lambda: world.hold(session_id(1)))
    with closing(LedgerThread(world.ledger())) as thread:
        holds = Holds(world.nodes[0].public, thread)
        with monkeypatch.context() as patched:
            patched.setattr(MemoryJournal, "write", full)
            with pytest.raises(GenerationFailed, match="cannot write its books now") as caught:
                asyncio.run(holds.open(terms))
        assert "secret" not in str(caught.value)
        assert thread.ledger.open_holds() == []
        asyncio.run(holds.open(terms))
        assert len(thread.ledger.open_holds()) == 1


def test_a_node_that_cannot_void_its_old_holds_ends_with_one_line() -> None:
    async def recover() -> int:
        raise JournalError("the ledger's database: the disk is full")

    node: Any = SimpleNamespace(_head=SimpleNamespace(recover=recover))
    with pytest.raises(UserError, match="cannot be voided: the ledger's database: the disk is full"):
        asyncio.run(NodeRuntime._recover(node))


def test_a_node_that_cannot_make_the_authority_ends_with_one_line() -> None:
    def ensure() -> None:
        raise OSError(28, "No space left on device")

    node: Any = SimpleNamespace(_authority=SimpleNamespace(ensure=ensure))
    with pytest.raises(UserError, match="cannot be made: "):
        NodeRuntime._open_door(node, None)  # type: ignore[arg-type]
