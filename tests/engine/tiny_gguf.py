"""Tiny GGUF models, written with gguf-py in any mix of encodings, and what transformers makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from node.models.bundle import ModelFacts
from node.models.package import ModelPackage, build_package

NUM_LAYERS = 2
VOCAB_SIZE = 160
NUM_HEADS, NUM_KV_HEADS = 4, 2
# Blocks of K-quants have 256 values.
HIDDEN_SIZE = 256
_BASE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 512,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_KV_HEADS,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def config_of(family: str, is_tied: bool) -> PreTrainedConfig:
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family]
    return kind(**_BASE, tie_word_embeddings=is_tied)


@dataclass(frozen=True)
class TinyGguf:
    """`package` is described with the dtype asked for; `reference` has transformers' dequantized weights."""

    path: Path
    package: ModelPackage
    reference: PreTrainedModel


def make_tiny_gguf(
    directory: Path,
    family: str,
    encoding: str,
    others: Mapping[str, str] | None = None,
    dtype: str = "auto",
    is_tied: bool = True,
) -> TinyGguf:
    """Linear weights in `encoding`, but for those named in `others` ("ffn_down", "token_embd", "output")."""
    config = config_of(family, is_tied)
    path = directory / f"{family}-{encoding}.gguf"
    write_gguf(path, config, encoding, others or {})

    def make_bundle(_source: Path, bundle_dir: Path) -> ModelFacts:
        config.to_json_file(bundle_dir / "config.json", use_diff=False)
        num_values = 2 * NUM_KV_HEADS * HIDDEN_SIZE // NUM_HEADS
        return ModelFacts(family, NUM_LAYERS, HIDDEN_SIZE, VOCAB_SIZE, 512, num_values, (2,))

    package = build_package(str(path), dtype, directory / "models", make_bundle=make_bundle)
    return TinyGguf(path, package, _reference(path, config))


def write_gguf(path: Path, config: PreTrainedConfig, encoding: str, others: Mapping[str, str]) -> None:
    family = config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN_SIZE)
    writer.add_block_count(NUM_LAYERS)
    writer.add_feed_forward_length(512)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    rng = np.random.default_rng(sum(f"{family}{encoding}".encode()))
    for name, shape in _shapes(config).items():
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values * 0.1 + ("norm" in name))
            continue
        part = name.split(".")[2 if name.startswith("blk") else 0]
        kind = GGMLQuantizationType[others.get(part, encoding)]
        writer.add_tensor(name, _blocks(values / 16, kind, rng), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    model = AutoModelForCausalLM.from_config(config)
    parameters = {name: tuple(value.shape) for name, value in model.named_parameters()}
    shapes = {
        "token_embd.weight": parameters["model.embed_tokens.weight"],
        "output_norm.weight": parameters["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        shapes["output.weight"] = parameters["lm_head.weight"]
    for layer in range(NUM_LAYERS):
        for theirs, ours in _LAYER_NAMES.items():
            for leaf in ("weight", "bias"):
                if f"model.layers.{layer}.{ours}.{leaf}" in parameters:
                    shapes[f"blk.{layer}.{theirs}.{leaf}"] = parameters[f"model.layers.{layer}.{ours}.{leaf}"]
    return shapes


def _blocks(values: np.ndarray, kind: GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    if kind != GGMLQuantizationType.Q6_K:
        return gguf.quants.quantize(values, kind)
    # gguf-py cannot write K-quants: blocks of any codes, with small scales and one small factor each.
    num_blocks = values.size // 256
    blocks = rng.integers(0, 256, (num_blocks, 210), dtype=np.uint8)
    blocks[:, 192:208] = rng.integers(1, 5, (num_blocks, 16), dtype=np.uint8)
    blocks[:, 208:] = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
    return blocks.reshape(values.shape[0], -1)


def _reference(path: Path, config: PreTrainedConfig) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config).float().eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(
        {name: torch.as_tensor(value) for name, value in tensors.items()}, strict=False
    )
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    return model
