"""The layers of one range as transformers' own modules: `embed`, `run`, `logits` on a packed row of tokens.

The model class is built on the meta device; only the modules of this range ever get memory (`loader.py`). It
knows no model family: decoder layers are called the way every family's own model class calls them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from node.engine.attention import PagedStep, attend
from node.engine.attention_op import attend_in_graph
from node.engine.compiled_layer import CompiledLayer
from node.engine.packed import PackedWeight
from node.engine.packed_linear import packed_module
from node.models.tensors import LAYER_PREFIX

ATTENTION = "gpu_pod_paged"
# On a CPU, compiled code keeps Python's lock for a whole layer: of longer inputs, the links would feel it.
MAX_NUM_COMPILED_ROWS = 64


class Shard:
    """Layers `[start_layer, end_layer)`, with the embedding if first and final norm and head if last."""

    def __init__(
        self,
        config: PreTrainedConfig,
        start_layer: int,
        end_layer: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
        self.config = config
        self.start_layer = start_layer
        self.end_layer = end_layer
        self.dtype = dtype
        self.device = device
        self._model = model.eval().requires_grad_(False)
        base = model.model
        self._layers = list(base.layers)[start_layer:end_layer]
        self._rotary = base.rotary_emb
        self._embedding = base.embed_tokens if start_layer == 0 else None
        is_last = end_layer == config.num_hidden_layers
        self._norm: nn.Module | None = base.norm if is_last else None
        self._head: nn.Module | None = model.lm_head if is_last else None
        self._compiled: dict[bool, dict[int, CompiledLayer]] = {True: {}, False: {}}
        self._has_rope_per_layer_type = "layer_type" in inspect.signature(self._rotary.forward).parameters
        self._final_softcap: float | None = getattr(config, "final_logit_softcapping", None)
        _materialise_buffers(model, [self._rotary, *self._layers, self._embedding], device)

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def head_dim(self) -> int:
        head_dim = self._layers[0].self_attn.head_dim
        assert isinstance(head_dim, int)
        return head_dim

    @property
    def layers(self) -> list[nn.Module]:
        """transformers' own modules of the range."""
        return self._layers

    @property
    def rotary(self) -> nn.Module:
        assert isinstance(self._rotary, nn.Module)
        return self._rotary

    @property
    def embedding(self) -> nn.Module | None:
        return self._embedding

    def parameter_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every own parameter, as transformers and the weight files name them."""
        parts: list[tuple[str, nn.Module | None]] = [
            (f"{LAYER_PREFIX}{layer}", module) for layer, module in enumerate(self._layers, self.start_layer)
        ]
        parts += [
            ("model.embed_tokens", self._embedding),
            ("model.norm", self._norm),
            ("lm_head", self._head),
        ]
        for prefix, part in parts:
            for name, parameter in part.named_parameters() if part is not None else ():
                yield f"{prefix}.{name}", tuple(parameter.shape)

    @property
    def num_weight_bytes(self) -> int:
        """Memory of the own parameters, those that are still to come included; tied ones count once."""
        parts = [*self._layers, self._embedding, self._norm, self._head]
        parameters = {id(p): p for part in parts if part is not None for p in part.parameters()}
        # Once set, what is tied are two parameters over the same memory.
        unique = {p.data_ptr() or key: p for key, p in parameters.items()}
        return sum(p.numel() * p.element_size() for p in unique.values())

    def set_parameter(self, name: str, tensor: Tensor) -> None:
        module_name, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(module_name)
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))

    def set_packed(self, name: str, packed: PackedWeight) -> None:
        module_name = name.removesuffix(".weight")
        module = self._model.get_submodule(module_name)
        stand_in = packed_module(module, packed, self.dtype, self.device)
        self._model.set_submodule(module_name, stand_in)
        self._embedding = stand_in if self._embedding is module else self._embedding
        self._head = stand_in if self._head is module else self._head

    def release_others(self) -> None:
        """Forget the meta modules of other ranges, once all own parameters are set."""
        del self._model

    def embed(self, ids_T: Tensor) -> Tensor:
        assert self._embedding is not None
        return torch.as_tensor(self._embedding(ids_T[None])[0])

    def run(self, hidden_TD: Tensor, positions_T: Tensor, step: PagedStep, start: int, end: int) -> Tensor:
        """Layers `[start, end)` over the packed row; keys and values go to the step's cache."""
        hidden, position_ids = hidden_TD[None], positions_T[None]
        ropes: dict[str | None, tuple[Tensor, Tensor]] = {}
        num_rows = len(hidden_TD)
        compiled = self._compiled[num_rows == 1]
        if self.device.type == "cpu" and num_rows > MAX_NUM_COMPILED_ROWS:
            compiled = {}
        for layer in range(start, end):
            kind = self._rope_kind(layer)
            if kind not in ropes:
                ropes[kind] = self.rope(layer, hidden, position_ids)
            if layer in compiled:
                hidden = compiled[layer](hidden, ropes[kind], step)
            else:
                hidden = self.run_eagerly(layer, hidden, position_ids, ropes[kind], step)
        return hidden[0]

    def run_eagerly(
        self, layer: int, hidden: Tensor, position_ids: Tensor, rope: tuple[Tensor, Tensor], step: PagedStep
    ) -> Tensor:
        """One layer over `hidden` `[1, T, D]`, as transformers' own module."""
        return torch.as_tensor(
            self._layers[layer - self.start_layer](
                hidden,
                attention_mask=None,
                position_ids=position_ids,
                position_embeddings=rope,
                paged=step,
            )
        )

    def rope(self, layer: int, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary embedding at the positions `[1, T]`."""
        kind = self._rope_kind(layer)
        named = {} if kind is None else {"layer_type": kind}
        cos, sin = self._rotary(hidden, position_ids, **named)
        return cos, sin

    def _rope_kind(self, layer: int) -> str | None:
        """What its rotary embedding depends on, beside the positions."""
        if not self._has_rope_per_layer_type:
            return None
        return str(self._layers[layer - self.start_layer].self_attn.layer_type)

    def set_compiled(self, is_one_row: bool, layer: CompiledLayer) -> None:
        """From the next step on, for steps of one row or of several. From any thread."""
        self._compiled[is_one_row][layer.layer] = layer

    def compiled_layers(self, is_one_row: bool) -> set[int]:
        return set(self._compiled[is_one_row])

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """`[B, vocabulary]` in float32."""
        assert self._norm is not None
        assert self._head is not None
        logits = torch.as_tensor(self._head(self._norm(hidden_BD)))
        if self._final_softcap is not None:
            logits = self._final_softcap * torch.tanh(logits / self._final_softcap)
        return logits.float()


def _materialise_buffers(model: PreTrainedModel, roots: list[nn.Module | None], device: torch.device) -> None:
    """Buffers such as rotary frequencies are in no file: transformers' own initialisation computes them."""
    for root in roots:
        for module in root.modules() if root is not None else ():
            meta = {name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
            for name in meta:
                setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
            if meta:
                model._init_weights(module)
            for name in meta:
                setattr(module, name, getattr(module, name).to(device))


def _paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    paged: PagedStep | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """`query` `[1, H, T, D]`, `key` and `value` `[1, K, T, D]` -> `[1, T, H, D]`; transformers' interface.

    Without a step, the layer is being compiled.
    """
    if paged is None:
        return attend_in_graph(query, key, value, scaling, sliding_window, softcap), None
    layer = module.layer_idx
    assert isinstance(layer, int)
    keys_KSD, values_KSD = paged.write(layer, key[0], value[0])
    return attend(query[0], keys_KSD, values_KSD, paged, scaling, sliding_window, softcap)[None], None


AttentionInterface.register(ATTENTION, _paged_attention)
