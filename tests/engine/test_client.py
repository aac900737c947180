"""The real engine process: loading with progress, refusals, death and return, and its end with its parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ledger.rate_card import DEFAULT_RATE_CARD
from node.engine.client import (
    EngineClient,
    EngineConfig,
    EngineError,
    EngineEvent,
    EngineExited,
    EngineRestarted,
    ShardSpec,
)
from pod.identity import KeyPair, certificate
from tests.engine.tiny import NUM_LAYERS, TinyModel

pytestmark = pytest.mark.processes
TIMEOUT_S = 120.0
POD = bytes(32)


@asynccontextmanager
async def engine(
    directory: Path, events: list[EngineEvent], data_listen: str = "127.0.0.1:0"
) -> AsyncIterator[EngineClient]:
    key_path = directory / "node.key"
    KeyPair.load_or_create(key_path)
    config = EngineConfig(key_path, POD, data_listen, "cpu", memory_bytes=64 << 20, num_threads=1)
    client = EngineClient(config, events.append)
    try:
        yield client
    finally:
        await client.stop()


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "not within the deadline"
        await asyncio.sleep(0.02)


def spec_of(model: TinyModel, start: int = 0, end: int = NUM_LAYERS) -> ShardSpec:
    return ShardSpec(model.package.directory, model.package.weights, start, end)


def is_alive(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_an_engine_loads_reports_refuses_and_comes_back_after_kill(llama: TinyModel, tmp_path: Path) -> None:
    asyncio.run(_life_of_an_engine(llama, tmp_path))


async def _life_of_an_engine(llama: TinyModel, tmp_path: Path) -> None:
    events: list[EngineEvent] = []
    async with engine(tmp_path, events) as client:
        ready = await client.start()
        assert ready.device == "cpu"
        assert ready.memory_bytes == 64 << 20
        assert ready.num_threads == 1
        assert ready.bytes_per_second > 10**8
        async with engine(tmp_path, [], ready.data_address) as second:
            with pytest.raises(EngineError, match=r"^cannot listen on 127\.0\.0\.1:\d+: .*in use$"):
                await second.start()
        await client.set_trust([certificate(KeyPair.of_seed(bytes(32))), b"no certificate"])
        await client.set_rate_card(DEFAULT_RATE_CARD.encode())

        progress: list[tuple[int, int]] = []
        shard = await client.load_shard(
            spec_of(llama, 1, 3), lambda done, total: progress.append((done, total))
        )
        manifest = llama.package.manifest
        assert shard.num_parameters == manifest.stage_num_parameters(1, 3)
        assert shard.dtype == "float32"
        assert shard.speed.decode_us[0] > 0
        assert not shard.speed.has_head
        assert progress[-1] == (4 * shard.num_parameters, 4 * shard.num_parameters)

        stats = await client.stats()
        assert [(one.start_layer, one.end_layer, one.num_sessions) for one in stats.shards] == [(1, 3, 0)]
        assert stats.shards[0].free_kv_tokens == shard.kv_capacity_tokens
        assert 0 < stats.used_memory_bytes <= ready.memory_bytes

        with pytest.raises(EngineError, match="has 4 layers"):
            await client.load_shard(spec_of(llama, 2, 9))
        with pytest.raises(EngineError, match="no such shard"):
            await client.drop_shard(shard.model, 0, 4)

        first_process = client.process_id
        assert first_process is not None
        os.kill(first_process, signal.SIGKILL)
        await until(lambda: any(isinstance(event, EngineRestarted) for event in events))
        assert isinstance(events[0], EngineExited)
        assert "signal 9" in events[0].reason
        back = next(event for event in events if isinstance(event, EngineRestarted))
        assert back.ready.data_address == ready.data_address
        assert [(one.start_layer, one.end_layer) for one in back.shards] == [(1, 3)]
        assert back.failed == ()

        await client.drop_shard(shard.model, 1, 3)
        stats = await client.stats()
        assert stats.shards == ()
        assert stats.used_memory_bytes == 0
        second_process = client.process_id
    assert second_process is not None
    assert not is_alive(second_process)


def test_an_engine_ends_with_its_parent(tmp_path: Path) -> None:
    KeyPair.load_or_create(tmp_path / "node.key")
    program = textwrap.dedent(
        f"""
        import asyncio
        from pathlib import Path
        from node.engine.client import EngineClient, EngineConfig

        async def main():
            key = Path({str(tmp_path / "node.key")!r})
            client = EngineClient(EngineConfig(key, bytes(32), "127.0.0.1:0", "cpu"), print)
            await client.start()
            print(client.process_id, flush=True)
            await asyncio.sleep(600)

        asyncio.run(main())
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        engine_process = int(parent.stdout.readline())
        assert is_alive(engine_process)
    finally:
        parent.kill()
        parent.communicate()
    deadline = time.monotonic() + TIMEOUT_S
    while is_alive(engine_process):
        assert time.monotonic() < deadline, "the engine outlived its parent"
        time.sleep(0.02)


def test_the_client_needs_no_torch() -> None:
    program = "import sys, node.engine.client, node.models.package; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
