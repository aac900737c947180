"""Loading: only own tensors are read, GGUF gives transformers' tokens, damaged files give one clear line."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from node.engine.device import choose_device, choose_dtype, is_out_of_memory
from node.engine.messages import DropShard, Failed, Message
from node.engine.process import EngineProcess
from node.models.bundle import make_bundle_here
from node.models.errors import ModelError
from node.models.package import ModelPackage, build_package
from node.models.safetensors_file import SafetensorsFile
from node.models.tensors import layer_of
from tests.engine.load_shard import load_shard
from tests.engine.ring import Ring, load
from tests.engine.tiny import NUM_LAYERS, TinyModel

CPU = torch.device("cpu")
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Count from one to twenty.",
    "Explain gravity to a child.",
    "List three prime numbers and say why they are prime.",
)


def bytes_read(package: ModelPackage, start: int, end: int) -> int:
    steps: list[tuple[int, int]] = []
    _, num_bytes = load_shard(
        package.manifest,
        package.directory,
        package.weights,
        start,
        end,
        torch.float32,
        CPU,
        lambda done, total: steps.append((done, total)),
    )
    assert steps[-1] == (num_bytes, num_bytes)
    assert steps == sorted(steps)
    return num_bytes


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_only_own_tensors_are_read(tiny: Callable[[str], TinyModel], family: str) -> None:
    package = tiny(family).package
    manifest = package.manifest
    for start in range(NUM_LAYERS):
        for end in range(start + 1, NUM_LAYERS + 1):
            expected = 4 * manifest.stage_num_parameters(start, end)
            if (start, end) == (0, NUM_LAYERS) and family == "qwen2":
                # Tied: a whole model holds the embedding once, and reads it once.
                expected -= 4 * manifest.embedding_num_parameters
            assert bytes_read(package, start, end) == expected


def test_a_shard_does_not_touch_the_bytes_of_other_layers(llama: TinyModel, tmp_path: Path) -> None:
    """The middle stage of a file whose other tensors are all NaN computes what it always does."""
    source = tmp_path / "poisoned"
    shutil.copytree(llama.directory, source)
    path = source / "model.safetensors"
    raw = bytearray(path.read_bytes())
    for name, place in SafetensorsFile(path).tensors.items():
        if layer_of(name) not in (1, 2):
            raw[place.start : place.end] = b"\xff" * place.size_bytes
    path.write_bytes(raw)
    outputs = []
    for paths in (llama.package.weights, (path,)):
        shard, _ = load_shard(
            llama.package.manifest, llama.package.directory, paths, 1, 3, torch.float32, CPU, lambda *_: None
        )
        outputs.append(torch.cat([p.flatten() for m in shard._layers for p in m.parameters()]))
    assert torch.equal(*outputs)


def test_a_part_of_a_shard_can_serve(llama: TinyModel) -> None:
    """Both engines hold the whole model; the route uses a half of each."""
    prompt = [9, 8, 7, 6]
    with Ring(llama.package, (2,)) as ring:
        for engine, loaded in zip(ring.engines, list(ring.shards), strict=True):
            engine.drop_shard(loaded.model, loaded.start_layer, loaded.end_layer).result(10)
            engine.add_shard(load(llama.package, 0, NUM_LAYERS))
        assert ring.generate([prompt])[0] == llama.generate(prompt, 16)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    models_dir = tmp_path_factory.mktemp("models")
    return build_package("smollm2-135m", "float32", models_dir, make_bundle=make_bundle_here)


def test_gguf_reads_only_own_tensors(smollm2: ModelPackage) -> None:
    blocks_bytes = (smollm2.manifest.layer_num_parameters[0] - 2 * 576) * 20 // 32 + 2 * 576 * 4
    assert bytes_read(smollm2, 4, 6) == 2 * blocks_bytes


def damage_safetensors(path: Path) -> dict[str, bytes]:
    raw = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", raw)
    header = raw[8 : 8 + header_bytes]
    return {
        "empty": b"",
        "only a length": raw[:8],
        "inside the header": raw[: header_bytes // 2],
        "inside the tensors": raw[:-100],
        "more than described": raw + b"\0",
        "a huge header": struct.pack("<Q", 2**63) + raw[8:],
        "no JSON": raw[:8] + b"\xff" * header_bytes + raw[8 + header_bytes :],
        "another shape": raw[:8] + header.replace(b"[96,48]", b"[48,96]") + raw[8 + header_bytes :],
        "another size": raw[:8] + header.replace(b"[96,48]", b"[99,48]") + raw[8 + header_bytes :],
    }


def assert_one_clear_line(error: ModelError, path: Path) -> None:
    assert "\n" not in str(error)
    assert str(path) in str(error)
    assert len(str(error)) < 400


def test_damaged_safetensors_are_named_in_one_line(llama: TinyModel, tmp_path: Path) -> None:
    for name, raw in damage_safetensors(llama.package.weights[0]).items():
        path = tmp_path / name.replace(" ", "-") / "model.safetensors"
        path.parent.mkdir()
        path.write_bytes(raw)
        with pytest.raises(ModelError) as caught:
            load_shard(
                llama.package.manifest,
                llama.package.directory,
                [path],
                0,
                4,
                torch.float32,
                CPU,
                lambda *_: None,
            )
        assert_one_clear_line(caught.value, path if name != "empty" else path.parent)


def test_damaged_gguf_is_named_in_one_line(smollm2: ModelPackage, tmp_path: Path) -> None:
    raw = smollm2.weights[0].read_bytes()
    table = raw.index(b"token_embd.weight")
    cases = {
        "empty": b"",
        "not-gguf": b"JUNK" + raw[4:1000],
        "version": raw[:4] + struct.pack("<I", 9) + raw[8:1000],
        "counts": raw[:8] + struct.pack("<QQ", 2**60, 2**60) + raw[24:1000],
        "in-metadata": raw[:200_000],
        "in-table": raw[: table + 300],
        "in-tensors": raw[:-4096],
        "type": raw[: table + 37] + struct.pack("<I", 250) + raw[table + 41 :],
        "other-architecture": raw.replace(b"llama", b"lamal"),
    }
    for name, damaged in cases.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(damaged)
        with pytest.raises(ModelError) as caught:
            build_package(str(path), "auto", tmp_path / "models", make_bundle=make_bundle_here)
        assert_one_clear_line(caught.value, path)
        path.unlink()
    assert not list((tmp_path / "models").glob("*/manifest.cbor"))


def test_missing_tensors_and_foreign_shapes_are_named(
    llama: TinyModel, tiny: Callable[[str], TinyModel]
) -> None:
    with pytest.raises(ModelError, match=r"lack the tensor model\.layers\.0\.self_attn\.q_norm\.weight"):
        load_shard(
            tiny("qwen3").package.manifest,
            tiny("qwen3").package.directory,
            llama.package.weights,
            0,
            1,
            torch.float32,
            CPU,
            lambda *_: None,
        )


def test_devices_and_dtypes() -> None:
    gib = 1 << 30
    assert choose_dtype("auto", CPU, gib, 8 * gib) is torch.float32
    assert choose_dtype("auto", CPU, gib, 7 * gib) is torch.bfloat16
    assert choose_dtype("float16", CPU, gib, 8 * gib) is torch.float16
    # This machine has no such device, so it has no bfloat16 on it either.
    assert choose_dtype("auto", torch.device("mps"), gib, 99 * gib) in (torch.float32, torch.bfloat16)
    assert choose_device("cpu") == CPU
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match=r"device 'cuda' is not available here \(available: .*cpu\)"):
            choose_device("cuda")


def test_out_of_memory_is_one_line_and_the_process_goes_on() -> None:
    sent: list[Message] = []
    process = object.__new__(EngineProcess)
    process._device = CPU
    process._pipe = SimpleNamespace(send=sent.append)  # type: ignore[assignment]
    for allocate in (lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: np.empty(1 << 60, np.uint8)):
        process._reporting(DropShard(7, b"", 0, 1), lambda _, allocate=allocate: allocate())
    assert sent == [Failed(7, "out of memory on cpu; the node goes on without")] * 2
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_bfloat16_stages_pass_bfloat16_rows(llama: TinyModel) -> None:
    shard, _ = load_shard(
        llama.package.manifest,
        llama.package.directory,
        llama.package.weights,
        0,
        4,
        torch.bfloat16,
        CPU,
        lambda *_: None,
    )
    assert shard.embed(torch.tensor([3, 4])).dtype is torch.bfloat16
