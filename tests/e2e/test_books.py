"""After many requests from several members at several nodes the books agree, balance and verify."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from node.local_pod import LocalNode
from tests.e2e.conftest import MODEL, LocalPod, start_pod, stop_pod, wait_until

pytestmark = pytest.mark.processes

NUM_REQUESTS = 50


async def _ask(pod: LocalPod, index: int, key: str, number: int) -> tuple[int, int]:
    """One request, streaming every second time; returns the client's (prompt tokens, output tokens)."""
    async with AsyncOpenAI(
        base_url=f"{pod.nodes[index].api_url}/v1", api_key=key, max_retries=0, timeout=180
    ) as client:
        arguments: dict[str, Any] = {
            "model": MODEL,
            "prompt": f"Request {number}:",
            "max_tokens": 4 + number % 9,
            "temperature": 0.8,
            "seed": number,
        }
        if number % 2:
            done = await client.completions.create(**arguments)
            usage = done.usage
        else:
            usage = None
            stream = await client.completions.create(
                **arguments, stream=True, stream_options={"include_usage": True}
            )
            async for chunk in stream:
                usage = chunk.usage or usage
        assert usage is not None
        return usage.prompt_tokens, usage.completion_tokens


def _balances(books: Any) -> dict[str, int]:
    return {account["name"]: account["balance_microcredits"] for account in books["accounts"]}


def test_fifty_requests_leave_the_same_books_everywhere(tmp_path: Path, packages: Path) -> None:
    pod = start_pod(tmp_path, packages)
    try:
        keys = [node.pod("key", "create", "--name", "books")["key"] for node in pod.nodes]

        async def run() -> list[tuple[int, int]]:
            return await asyncio.gather(
                *(_ask(pod, number % 3, keys[(number // 3) % 3], number) for number in range(NUM_REQUESTS))
            )

        usages = asyncio.run(run())

        def agreed() -> Any:
            books = [node.pod("ledger") for node in pod.nodes]
            same = all(_balances(b) == _balances(books[0]) for b in books)
            return books if same and not any(b["num_open_holds"] for b in books) else None

        books = wait_until("all nodes show the same balances", agreed, 5)
        assert [b["sum_microcredits"] for b in books] == [0, 0, 0]
        consumed = sum(a.get("num_consumed_tokens", 0) for a in books[0]["accounts"])
        assert consumed == sum(prompt + output for prompt, output in usages)
        for node in pod.nodes:
            verified = node.pod("ledger", "verify")
            assert verified["ok"], verified
            assert verified["sum_microcredits"] == 0
    finally:
        stop_pod(pod)
    _a_flipped_byte_is_found(pod, tmp_path)


def _a_flipped_byte_is_found(pod: LocalPod, directory: Path) -> None:
    """In a copy of a node's state: one byte of one stored entry, the append-only triggers put aside."""
    copy = LocalNode("copy", directory / "copy")
    shutil.copytree(pod.nodes[1].home, copy.home)
    author, index = _flip_a_byte(copy.home / "ledger.sqlite")
    done = subprocess.run(
        [sys.executable, "-m", "node", "ledger", "verify"],
        env=copy.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert f"entry {index} of {author.hex()[:8]}" in done.stderr
    assert "Traceback" not in done.stderr


def _flip_a_byte(path: Path) -> tuple[bytes, int]:
    """In the longest entry (a settlement); returns its author and index."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        for (name,) in db.execute("select name from sqlite_master where type = 'trigger'").fetchall():
            db.execute(f"drop trigger {name}")
        row_id, author, index, raw = db.execute(
            "select rowid, author, entry_index, raw from entries order by length(raw) desc limit 1"
        ).fetchone()
        flipped = bytearray(raw)
        flipped[len(flipped) // 2] ^= 1
        db.execute("update entries set raw = ? where rowid = ?", (bytes(flipped), row_id))
        db.commit()
        return author, index
