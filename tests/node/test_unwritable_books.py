"""A database that takes nothing: requests end with one clear line, and no hold is left behind."""

from __future__ import annotations

import asyncio
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest

from ledger.journal import JournalError
from ledger.memory_journal import MemoryJournal
from node.gateway.backend import GenerationFailed
from node.ledger_thread import LedgerThread
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
