"""`pod up` on a terminal shows what loads, and how far it is."""

from __future__ import annotations

import asyncio
import io

import pytest
from rich.console import Console

from node import process
from node.cli import show


def test_bars_come_with_every_load_and_go_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(show, "err", Console(file=written, force_terminal=True, width=120))
    monkeypatch.setattr(process, "LOOK_EVERY_S", 0)
    bars_made = 0

    class Counted(show.LoadBars):
        def __init__(self, is_transient: bool = False) -> None:
            nonlocal bars_made
            bars_made += 1
            super().__init__(is_transient)

    monkeypatch.setattr(show, "LoadBars", Counted)
    first = [{"what": "smollm2[0:10)", "done_bytes": done << 20, "total_bytes": 30 << 20} for done in (3, 30)]
    second = {"what": "qwen[4:8)", "done_bytes": 1, "total_bytes": 2}
    looks = iter([[], first[:1], first[:1], first[1:], [], [], [second], [second], []])

    def loading() -> list[dict[str, object]]:
        try:
            return next(looks)
        except StopIteration:
            raise asyncio.CancelledError from None

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(process.show_loading(loading))
    assert bars_made == 2
    assert "smollm2[0:10)" in written.getvalue()
    assert "qwen[4:8)" in written.getvalue()
    assert "30.0/30.0 MiB" in written.getvalue()
