"""A shard whose layers run in the C++ kernels: the same interface as `Shard`, on CPUs, rows in float32.

transformers' modules on the meta device say names, shapes and frequencies; their weights are never made. A
weight is laid out for the kernels as it arrives, one at a time. Keys stand transposed within a block of the
cache, so the cache is for this shard alone.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from node.engine.attention import PagedStep
from node.engine.kv_cache import KvCache
from node.engine.native.abi import SPAN, Kernels, Layer, Weight
from node.engine.native.architecture import (
    describe,
    norm_names,
    norm_offset,
    place_layer,
    rope_of,
)
from node.engine.native.arena import Arena
from node.engine.packed import GROUP, PackedWeight
from node.engine.shard import Shard
from node.models.tensors import LAYER_PREFIX

_LINEARS = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "output",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
_FLOAT_BITS = {torch.float32: 32, torch.bfloat16: 16}


class NativeShard:
    """Layers `[start_layer, end_layer)`; what `why_not` refuses must not come here."""

    def __init__(
        self,
        kernels: Kernels,
        config: PreTrainedConfig,
        start_layer: int,
        end_layer: int,
        weight_dtype: torch.dtype,
        num_threads: int,
    ) -> None:
        """`weight_dtype`: float32 or bfloat16, of the linear weights that come unpacked."""
        self.config = config
        self.start_layer = start_layer
        self.end_layer = end_layer
        self.dtype = torch.float32
        self.cache_dtype = torch.float16
        self.device = torch.device("cpu")
        self.weight_dtype = weight_dtype
        self._kernels = kernels
        self._num_threads = num_threads
        self._outline = Shard(config, start_layer, end_layer, torch.float32, self.device)
        self._layers = (Layer * (end_layer - start_layer))()
        self._norm_fields = norm_names(config.model_type)
        self._norm_offset = norm_offset(config.model_type)
        self._arena = Arena()
        self._vectors: list[Tensor] = []
        self._laid_out: dict[int, tuple[Tensor | PackedWeight, Weight]] = {}
        outline = self._outline
        self._model = describe(config, outline.layers[0].get_submodule("self_attn"), outline.embedding)
        self._model.num_layers = len(self._layers)
        self._model.layers = self._layers
        self._place_layers()
        self._context: int | None = None
        self._cache: weakref.ref[KvCache] | None = None

    @property
    def head_dim(self) -> int:
        return int(self._model.head_dim)

    @property
    def num_weight_bytes(self) -> int:
        return self._arena.num_bytes + sum(vector.nbytes for vector in self._vectors)

    def _place_layers(self) -> None:
        kinds: dict[str | None, int] = {}
        for layer, module in zip(self._layers, self._outline.layers, strict=True):
            attention = module.get_submodule("self_attn")
            layer_type = getattr(attention, "layer_type", None)
            rope = rope_of(self._outline.rotary, layer_type)
            self._vectors.append(rope.inverse_frequencies)
            by_type = hasattr(self._outline.rotary, f"{layer_type}_inv_freq")
            kind = kinds.setdefault(layer_type if by_type else None, len(kinds))
            place_layer(layer, self.config, attention, rope, kind)

    # Weights, as the loader hands them over.

    def parameter_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        return self._outline.parameter_shapes()

    def set_parameter(self, name: str, tensor: Tensor) -> None:
        if tensor.dim() == 2:
            self._set_linear(name, tensor, self._lay_out_floats)
        else:
            self._set_vector(name, tensor)

    def set_packed(self, name: str, packed: PackedWeight) -> None:
        self._set_linear(name, packed, self._lay_out_groups)

    def release_others(self) -> None:
        """All weights are set: the kernels may start."""
        self._laid_out.clear()
        context = self._kernels.new(self._model, self._num_threads)
        if not context:
            raise MemoryError
        self._context = context
        weakref.finalize(self, self._kernels.free, context)

    def _set_linear(
        self,
        name: str,
        value: Tensor | PackedWeight,
        lay_out: Callable[[Tensor | PackedWeight], Weight],
    ) -> None:
        # A head tied to the embedding arrives as the same object.
        known = self._laid_out.get(id(value))
        weight = known[1] if known else lay_out(value)
        module = name.removesuffix(".weight")
        if module in ("model.embed_tokens", "lm_head"):
            self._laid_out = {id(value): (value, weight)}
            setattr(self._model, "embedding" if module == "model.embed_tokens" else "head", weight)
            return
        layer, part = self._layer_of(module)
        setattr(layer, _LINEARS[part], weight)

    def _set_vector(self, name: str, tensor: Tensor) -> None:
        values = tensor.float().clone()
        module, _, leaf = name.rpartition(".")
        if leaf == "weight":
            values += self._norm_offset
        self._vectors.append(values)
        if module == "model.norm":
            self._model.final_norm = values.data_ptr()
            return
        layer, part = self._layer_of(module)
        field = f"{_LINEARS[part]}_bias" if leaf == "bias" else self._norm_fields[part]
        setattr(layer, field, values.data_ptr())

    def _layer_of(self, module: str) -> tuple[Layer, str]:
        number, _, part = module.removeprefix(LAYER_PREFIX).partition(".")
        return self._layers[int(number) - self.start_layer], part

    def _lay_out_groups(self, value: Tensor | PackedWeight) -> Weight:
        assert isinstance(value, PackedWeight)
        rows, columns = value.shape
        assert columns % GROUP == 0
        weight = self._new_weight(value.bits, rows, columns)
        codes, scales = value.codes.contiguous(), value.scales.contiguous()
        minima = None if value.minima is None else value.minima.contiguous()
        self._kernels.pack_groups(
            value.bits,
            rows,
            columns,
            codes.data_ptr(),
            scales.data_ptr(),
            None if minima is None else minima.data_ptr(),
            weight.data,
        )
        return weight

    def _lay_out_floats(self, value: Tensor | PackedWeight) -> Weight:
        assert isinstance(value, Tensor)
        values = value.to(self.weight_dtype).contiguous()
        rows, columns = values.shape
        weight = self._new_weight(_FLOAT_BITS[self.weight_dtype], rows, columns)
        self._kernels.pack_floats(weight.bits, rows, columns, values.data_ptr(), weight.data)
        return weight

    def _new_weight(self, bits: int, rows: int, columns: int) -> Weight:
        num_bytes = self._kernels.weight_bytes(bits, rows, columns)
        return Weight(bits, rows, columns, 0, self._arena.allocate(num_bytes))

    # Steps.

    def embed(self, ids_T: Tensor) -> Tensor:
        hidden_TD = torch.empty(len(ids_T), self._model.hidden_size)
        ids_T = ids_T.contiguous()
        self._kernels.embed(self._context, ids_T.data_ptr(), len(ids_T), hidden_TD.data_ptr())
        return hidden_TD

    def run(self, hidden_TD: Tensor, positions_T: Tensor, step: PagedStep, start: int, end: int) -> Tensor:
        """Layers `[start, end)` over the packed row, in place."""
        if self._cache is None or self._cache() is not step.cache:
            self._use_cache(step.cache)
        hidden_TD = hidden_TD.contiguous()
        spans = bytearray(SPAN.size * len(step.spans))
        for index, span in enumerate(step.spans):
            blocks = span.table.blocks.buffer_info()[0]
            counts = span.position, span.num_tokens, span.num_prompt_tokens
            SPAN.pack_into(spans, index * SPAN.size, blocks, *counts)
        failed = self._kernels.run(
            self._context,
            hidden_TD.data_ptr(),
            ctypes.addressof(ctypes.c_char.from_buffer(spans)),
            len(step.spans),
            start - self.start_layer,
            end - self.start_layer,
        )
        if failed:
            raise MemoryError
        return hidden_TD

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """`[B, vocabulary]`."""
        hidden_BD = hidden_BD.contiguous()
        logits_BV = torch.empty(len(hidden_BD), self._model.head.n)
        if self._kernels.logits(self._context, hidden_BD.data_ptr(), len(hidden_BD), logits_BV.data_ptr()):
            raise MemoryError
        return logits_BV

    def _use_cache(self, cache: KvCache) -> None:
        for index, layer in enumerate(self._layers):
            keys_KSD, values_KSD = cache.layer(self.start_layer + index)
            assert keys_KSD.dtype == self.cache_dtype
            layer.keys, layer.values = keys_KSD.data_ptr(), values_KSD.data_ptr()
        self._kernels.set_num_slots(self._context, cache.num_tokens)
        self._cache = weakref.ref(cache)
