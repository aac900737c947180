"""Tiny random models of every supported family, saved as safetensors, with weights that keep logits apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from node.models.bundle import make_bundle_here
from node.models.package import ModelPackage, build_package

NUM_LAYERS = 4
VOCAB_SIZE = 199
EOS_ID = 2
_BASE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": EOS_ID,
    "pad_token_id": 0,
}


def configs() -> dict[str, PreTrainedConfig]:
    """The window is shorter than the prompts, so that it matters."""
    gemma = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
    layer_types = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)
    return {
        "llama": LlamaConfig(**_BASE),
        "qwen2": Qwen2Config(
            **_BASE, use_sliding_window=True, sliding_window=8, max_window_layers=2, tie_word_embeddings=True
        ),
        "qwen3": Qwen3Config(**_BASE, head_dim=16),
        "mistral": MistralConfig(**_BASE, sliding_window=8),
        "gemma2": Gemma2Config(**_BASE, **gemma),
        "gemma3": Gemma3TextConfig(**_BASE, **gemma, layer_types=layer_types),
    }


@dataclass(frozen=True)
class TinyModel:
    package: ModelPackage
    reference: PreTrainedModel

    @property
    def directory(self) -> Path:
        return self.package.weights[0].parent

    def generate(self, prompt_ids: list[int], num_tokens: int) -> list[int]:
        """What transformers itself generates, greedily, never stopping early."""
        prompt = torch.tensor([prompt_ids])
        output = self.reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=num_tokens,
            eos_token_id=VOCAB_SIZE + 1,
            pad_token_id=0,
        )
        return output[0, len(prompt_ids) :].tolist()


def make_tiny(family: str, directory: Path) -> TinyModel:
    config = configs()[family]
    generator = torch.Generator().manual_seed(sum(family.encode()))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_unit_norm = "norm" in name and not family.startswith("gemma")
            parameter.copy_(noise * (0.3 if parameter.ndim > 1 else 0.2) + float(is_unit_norm))
    model.generation_config.cache_implementation = None
    source = directory / family
    model.save_pretrained(source)
    return TinyModel(
        build_package(str(source), "float32", directory / "models", make_bundle=make_bundle_here), model
    )
