"""The engine process with packed weights: what it says it holds, what it books, and what it refuses."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from node.engine.client import EngineError, EngineEvent, ShardSpec
from tests.engine.test_client import engine
from tests.engine.tiny_gguf import NUM_LAYERS, make_tiny_gguf

pytestmark = pytest.mark.processes


def test_a_packed_shard_is_reported_and_booked_as_such(tmp_path: Path) -> None:
    asyncio.run(_load_packed(tmp_path))


async def _load_packed(directory: Path) -> None:
    """`auto` of this machine (packed with a compiler, else floats), then int8 asked for; then damage."""
    model = make_tiny_gguf(directory, "llama", "Q4_0", {"token_embd": "Q8_0"})
    events: list[EngineEvent] = []
    package = model.package
    async with engine(directory, events) as client:
        await client.start()
        for dtype, names in (("auto", ("int4", "float32")), ("int8", ("int4",)), ("float32", ("float32",))):
            spec = ShardSpec(package.directory, package.weights, 0, NUM_LAYERS, dtype)
            ready = await client.load_shard(spec, lambda *_: None)
            assert ready.dtype in names
            planned = package.manifest.stage_bytes(0, NUM_LAYERS)
            if ready.dtype == "int4":
                assert 0.8 * planned < ready.num_weight_bytes < 1.3 * planned
            else:
                assert ready.num_weight_bytes > 4 * planned
            await client.drop_shard(ready.model, 0, NUM_LAYERS)
        assert (await client.stats()).used_memory_bytes == 0
        model.path.write_bytes(model.path.read_bytes()[:-1000])
        with pytest.raises(EngineError, match=r"is damaged or truncated \(.* ends at byte"):
            await client.load_shard(spec, lambda *_: None)
        assert (await client.stats()).used_memory_bytes == 0
