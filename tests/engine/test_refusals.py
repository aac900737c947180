"""What a model file or bundle may not bring along, and the memory a shard is booked with."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from node.engine.shard import Shard
from node.models.errors import ModelError
from node.models.gguf_file import GgufFile
from node.models.package import ModelPackage
from node.models.safetensors_file import SafetensorsFile
from tests.engine.load_shard import load_shard
from tests.engine.tiny import NUM_LAYERS, TinyModel

CPU = torch.device("cpu")


def load_tiny(
    package: ModelPackage, paths: Sequence[Path], start: int, end: int, max_num_bytes: int | None = None
) -> Shard:
    return load_shard(
        package.manifest,
        package.directory,
        paths,
        start,
        end,
        torch.bfloat16,
        CPU,
        lambda *_: None,
        max_num_bytes,
    )[0]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_shard_is_booked_with_the_memory_it_takes(tiny: Callable[[str], TinyModel], family: str) -> None:
    """The files are float32, the shard is bfloat16."""
    package = tiny(family).package
    manifest = package.manifest
    for start, end in ((0, 2), (2, NUM_LAYERS), (0, NUM_LAYERS)):
        expected = 2 * manifest.stage_num_parameters(start, end)
        if family == "qwen2" and (start, end) == (0, NUM_LAYERS):
            expected -= 2 * manifest.embedding_num_parameters
        assert load_tiny(package, package.weights, start, end).num_weight_bytes == expected


def test_what_does_not_fit_is_not_loaded(llama: TinyModel) -> None:
    package = llama.package
    num_bytes = 2 * package.manifest.stage_num_parameters(0, 2)
    load_tiny(package, package.weights, 0, 2, num_bytes)
    with pytest.raises(ModelError, match=r"need \S+ MiB of memory, \S+ MiB are free, \S+ MiB are missing$"):
        load_tiny(package, package.weights, 0, 2, num_bytes - 1)


@pytest.mark.parametrize(
    ("name", "value"), [("hidden_size", 64), ("vocab_size", 500), ("model_type", "mistral")]
)
def test_a_config_that_is_not_the_manifests_is_refused(llama: TinyModel, name: str, value: object) -> None:
    manifest = replace(llama.package.manifest, **{name: value})
    with pytest.raises(ModelError, match=f"the config's {name} is"):
        load_tiny(replace(llama.package, manifest=manifest), llama.package.weights, 0, 1)


@pytest.mark.parametrize(("name", "value"), [("model_type", "gpt2"), ("rope_type", "dynamic")])
def test_a_bundle_chooses_no_other_class_and_no_rope_of_the_batch(
    llama: TinyModel, tmp_path: Path, name: str, value: str
) -> None:
    config = json.loads((llama.package.directory / "config.json").read_text())
    if name == "rope_type":
        config["rope_parameters"] |= {"rope_type": value, "factor": 2.0}
    else:
        config[name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"'{value}' is not supported"):
        load_tiny(replace(llama.package, directory=tmp_path), llama.package.weights, 0, 1)


def make_gguf(path: Path, keys: dict[str, str | float], tensors: tuple[str, ...] = ()) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_float32(key, value)
    for name in ("token_embd.weight", *tensors):
        writer.add_tensor(name, np.zeros((2, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tensor", ["rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.attn_q_norm.weight"])
def test_a_tensor_nobody_would_read_is_refused(tmp_path: Path, tensor: str) -> None:
    with pytest.raises(ModelError, match=f"the tensor {tensor} is not supported"):
        GgufFile(make_gguf(tmp_path / "model.gguf", {}, (tensor,)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.scaling.factor", 4.0),
        ("llama.attention.sliding_window", 512.0),
        ("llama.attn_logit_softcapping", 50.0),
    ],
)
def test_a_key_nobody_would_read_is_refused(tmp_path: Path, key: str, value: str | float) -> None:
    with pytest.raises(ModelError, match=f"{key} = .* is not supported"):
        GgufFile(make_gguf(tmp_path / "model.gguf", {key: value}))


def test_keys_that_say_nothing_new_are_taken(tmp_path: Path) -> None:
    keys = {"llama.rope.scaling.type": "none", "llama.context_length": 64.0, "llama.rope.freq_base": 1e4}
    assert GgufFile(make_gguf(tmp_path / "model.gguf", keys)).tensors


HUGE = struct.pack("<Q", 2**64 - 1)
KEY = struct.pack("<Q", 1) + b"k"
LENGTHS = {
    "string": KEY + struct.pack("<I", 8) + HUGE,
    "array of strings": KEY + struct.pack("<IIQ", 9, 8, 4) + HUGE + HUGE,
    "array of numbers": KEY + struct.pack("<II", 9, 4) + HUGE,
    "key": HUGE,
}


@pytest.mark.parametrize("kind", list(LENGTHS))
def test_a_length_beyond_all_files_is_damage(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + LENGTHS[kind] + bytes(64))
    with pytest.raises(ModelError, match="damaged or truncated"):
        GgufFile(path)


def test_a_dtype_nobody_knows_is_refused_when_describing(llama: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(llama.package.weights[0].read_bytes().replace(b'"F32"', b'"Q99"', 1))
    with pytest.raises(ModelError, match="is stored as 'Q99'"):
        SafetensorsFile(path)
