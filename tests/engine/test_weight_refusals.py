"""Weights that cannot be used are named in one line: NaN, encodings and quantizations nobody reads."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoConfig

from node.models.bundle import check_config
from node.models.errors import ModelError
from node.models.gguf_file import ENCODINGS, GgufFile
from node.models.safetensors_file import SafetensorsFile
from tests.engine.packed_world import (
    load,
    quantized_safetensors,
)
from tests.engine.tiny_gguf import make_tiny_gguf


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


def write_nan(path: Path, start: int, num_bytes: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[start : start + num_bytes] = b"\xff" * num_bytes
    path.write_bytes(raw)


@pytest.mark.parametrize("dtype", ["float32", "auto", "int4"])
def test_nan_in_weights_is_named(tmp_path: Path, dtype: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    for model in (make_tiny_gguf(tmp_path, "llama", "Q4_1"), make_tiny_gguf(tmp_path, "llama", "F32")):
        place = GgufFile(model.path).tensors[name]
        write_nan(model.path, place.start, 4)
        with pytest.raises(ModelError, match=f"{name} holds NaN or values beyond the range") as caught:
            load(model.package, dtype)
        assert "\n" not in str(caught.value)


def test_nan_in_safetensors_is_named(directory: Path) -> None:
    package, _ = quantized_safetensors(directory, "int8")
    (path,) = package.weights
    place = SafetensorsFile(path).tensors["model.layers.0.input_layernorm.weight"]
    write_nan(path, place.end - 4, 4)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.input_layernorm\.weight holds NaN"):
        load(package, "int8")


def test_every_encoding_that_is_offered_can_be_read() -> None:
    for name in ENCODINGS:
        kind = gguf.GGMLQuantizationType[name]
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = torch.zeros(2, 4 * block_bytes, dtype=torch.uint8).numpy()
        assert gguf.quants.dequantize(blocks, kind).shape == (2, 4 * block_values)


def test_an_encoding_nobody_reads_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.ffn_up.weight", torch.zeros(2, 256, dtype=torch.int8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"type I8 of blk\.0\.ffn_up\.weight is not.*Q4_0, Q4_1"):
        GgufFile(path)


def test_a_quantized_config_is_named(directory: Path, tmp_path: Path) -> None:
    package, _ = quantized_safetensors(directory, "int8")
    config = json.loads((package.directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(
        ModelError, match=r"quantization 'gptq' .* is not supported \(supported: .*--quantize"
    ):
        check_config(AutoConfig.from_pretrained(tmp_path), tmp_path)
