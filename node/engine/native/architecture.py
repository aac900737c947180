"""Which models the kernels can run, and their shape, read from transformers' config and meta modules."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig

from node.engine.native.abi import Layer, Model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
_ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}
# Frequencies that depend on the length of the sequence are transformers' business.
_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
_NORMS_ADD_ONE = ("gemma2", "gemma3_text")
_FAMILIES_WITH_ONE_WINDOW = ("mistral",)
_FAMILIES_WITH_FOUR_NORMS = ("gemma2", "gemma3_text")
_MULTIPLE = 32
_LANES = 16
_MAX_HEAD_DIM = 256
_MAX_NUM_ROPE_KINDS = 2


@dataclass(frozen=True, slots=True)
class Rope:
    """What one kind of layer turns its heads by."""

    inverse_frequencies: Tensor
    scale: float


def why_not(config: PreTrainedConfig) -> str | None:
    """Why the kernels cannot run this model, in one line; None when they can."""
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is not among {', '.join(FAMILIES)}"
    if _activation(config) not in _ACTIVATIONS:
        return f"its activation is {_activation(config)}"
    head_dim = _head_dim(config)
    sizes = (config.hidden_size, config.intermediate_size, config.num_attention_heads * head_dim)
    if any(size % _MULTIPLE for size in sizes):
        return f"its sizes {sizes} are not all multiples of {_MULTIPLE}"
    if head_dim % _LANES or head_dim > _MAX_HEAD_DIM:
        return f"its heads have {head_dim} dimensions"
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        return f"its {num_heads} heads do not share {num_kv_heads} heads of keys and values evenly"
    if any(share != 1 for share in _rotary_shares(config)):
        return "its rotary embedding turns a part of each head"
    if unknown := _rope_types(config) - _ROPE_TYPES:
        return f"its rotary embedding is of type {', '.join(sorted(unknown))}"
    if getattr(config, "mlp_bias", False):
        return "its MLP has biases"
    return None


def describe(config: PreTrainedConfig, attention: nn.Module, embedding: nn.Module | None) -> Model:
    """All but weights and layers. `attention` is any layer's."""
    return Model(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        activation=_ACTIVATIONS[_activation(config)],
        norm_epsilon=config.rms_norm_eps,
        attention_scale=attention.__dict__["scaling"],
        attention_softcap=getattr(config, "attn_logit_softcapping", None) or 0.0,
        embedding_scale=float(getattr(embedding, "scalar_embed_scale", 1.0)),
        final_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
    )


def norm_names(model_type: str) -> dict[str, str]:
    """The field of `Layer` for each norm, by transformers' name."""
    before_mlp = "post_attention_layernorm"
    names = {"input_layernorm": "norm_before_attention", before_mlp: "norm_before_mlp"}
    if model_type in _FAMILIES_WITH_FOUR_NORMS:
        names |= {
            before_mlp: "norm_after_attention",
            "pre_feedforward_layernorm": "norm_before_mlp",
            "post_feedforward_layernorm": "norm_after_mlp",
        }
    return names | {"self_attn.q_norm": "query_norm", "self_attn.k_norm": "key_norm"}


def norm_offset(model_type: str) -> float:
    return 1.0 if model_type in _NORMS_ADD_ONE else 0.0


def rope_of(rotary: nn.Module, layer_type: str | None) -> Rope:
    """transformers' own frequencies; `layer_type` where they differ by type of layer."""
    prefix = f"{layer_type}_" if layer_type and hasattr(rotary, f"{layer_type}_inv_freq") else ""
    frequencies = getattr(rotary, f"{prefix}inv_freq")
    assert isinstance(frequencies, Tensor)
    return Rope(frequencies.float().contiguous(), float(getattr(rotary, f"{prefix}attention_scaling")))


def place_layer(layer: Layer, config: PreTrainedConfig, attention: nn.Module, rope: Rope, kind: int) -> None:
    """What a layer knows of positions. Raises ValueError for what would not fit the kernels' tables."""
    if kind >= _MAX_NUM_ROPE_KINDS or 2 * len(rope.inverse_frequencies) != _head_dim(config):
        raise ValueError("a rotary embedding that the kernels have no room for")
    # Mistral's layers ask the config for their window.
    own = config if config.model_type in _FAMILIES_WITH_ONE_WINDOW else attention
    layer.window = getattr(own, "sliding_window", None) or 0
    layer.rope_kind = kind
    layer.rotary_dim = 2 * len(rope.inverse_frequencies)
    layer.rotary_scale = rope.scale
    layer.inverse_frequencies = rope.inverse_frequencies.data_ptr()


def _activation(config: PreTrainedConfig) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope_parameters(config: PreTrainedConfig) -> list[dict[str, object]]:
    """One set for the model, or one for each type of layer."""
    parameters = config.rope_parameters or {}
    return [value for value in parameters.values() if isinstance(value, dict)] or [parameters]


def _rope_types(config: PreTrainedConfig) -> set[str]:
    return {str(each.get("rope_type", "default")) for each in _rope_parameters(config)}


def _rotary_shares(config: PreTrainedConfig) -> list[object]:
    own = getattr(config, "partial_rotary_factor", None)
    return [each.get("partial_rotary_factor", own) or 1 for each in _rope_parameters(config)]
