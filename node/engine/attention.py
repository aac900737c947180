"""Attention over the paged KV cache: of all sessions of a step, each over its own true length.

The batch is one packed row: the tokens of all sessions one after another; which of them attend in one call is
the plan's (`attention_plan.py`). Nothing here knows a model family. T tokens, H heads, K KV heads, G = H / K,
D head dimension, B sessions of a part, N rows of each, R = B x N, L length attended to, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from node.engine.attention_plan import Part, Plan, make_plan, written_slots
from node.engine.attention_plan import Span as Span
from node.engine.kv_cache import KvCache


class PagedStep:
    """What attention needs to know of one step, the same for all layers."""

    def __init__(self, cache: KvCache, spans: Sequence[Span]) -> None:
        self.cache = cache
        self.spans = spans
        self._written: Tensor | tuple[int, int] | None = None
        self._plans: dict[int | None, Plan] = {}

    def write(self, layer: int, key_KTD: Tensor, value_KTD: Tensor) -> tuple[Tensor, Tensor]:
        """Into the slots of this step's tokens; the layer's whole cache is returned."""
        if self._written is None:
            self._written = written_slots(self.spans, key_KTD.device)
        caches = self.cache.layer(layer)
        for cache_KSD, rows_KTD in zip(caches, (key_KTD, value_KTD), strict=True):
            if isinstance(self._written, tuple):
                cache_KSD.narrow(1, *self._written).copy_(rows_KTD)
            else:
                cache_KSD.index_copy_(1, self._written, rows_KTD.to(cache_KSD.dtype))
        return caches

    def plan(self, window: int | None, device: torch.device, dtype: torch.dtype) -> Plan:
        """`window`: a token sees no further back than so many tokens, itself included."""
        plan = self._plans.get(window)
        if plan is None:
            plan = self._plans[window] = make_plan(self.spans, window, device, dtype)
        return plan


def attend(
    query_HTD: Tensor,
    keys_KSD: Tensor,
    values_KSD: Tensor,
    step: PagedStep,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """-> `[T, H, D]`. `keys_KSD` and `values_KSD` are a layer's cache, this step's tokens already in it."""
    _, num_tokens, head_dim = query_HTD.shape
    num_kv_heads = keys_KSD.shape[0]
    scale = head_dim**-0.5 if scaling is None else scaling
    query_TKGD = query_HTD.transpose(0, 1).reshape(num_tokens, num_kv_heads, -1, head_dim)
    plan = step.plan(window, query_HTD.device, query_HTD.dtype)
    if len(plan.parts) == 1 and plan.order is None:
        return _attend_part(query_TKGD, keys_KSD, values_KSD, plan.parts[0], scale, softcap)
    outputs_RHD = torch.cat(
        [
            _attend_part(query_TKGD[part.rows], keys_KSD, values_KSD, part, scale, softcap)
            for part in plan.parts
        ]
    )
    return outputs_RHD if plan.order is None else outputs_RHD.index_select(0, plan.order)


def _attend_part(
    query_RKGD: Tensor, keys_KSD: Tensor, values_KSD: Tensor, part: Part, scale: float, softcap: float | None
) -> Tensor:
    """-> `[R, H, D]`."""
    num_rows, num_kv_heads, num_groups, head_dim = query_RKGD.shape
    keys_BKLD = _read(keys_KSD, part, query_RKGD.dtype)
    values_BKLD = _read(values_KSD, part, query_RKGD.dtype)
    mask = part.mask_B1NL
    if part.is_chunk:
        # KV heads are the batch and the query heads that share one its heads: KV and mask are never copied.
        query = query_RKGD.permute(1, 2, 0, 3)
        keys = keys_BKLD.transpose(0, 1).expand(-1, num_groups, -1, -1)
        values = values_BKLD.transpose(0, 1).expand(-1, num_groups, -1, -1)
        output = _dot_product(query, keys, values, mask, scale, softcap)
        return output.permute(2, 0, 1, 3).reshape(num_rows, -1, head_dim)
    if part.num_rows == 1:
        output = _dot_product(query_RKGD, keys_BKLD, values_BKLD, mask, scale, softcap)
        return output.reshape(num_rows, -1, head_dim)
    # Query heads that share a KV head run as further rows against it.
    shape = (part.num_sessions, part.num_rows, num_kv_heads, num_groups, head_dim)
    query = query_RKGD.reshape(shape).permute(0, 2, 3, 1, 4).flatten(2, 3)
    mask = None if mask is None else mask.repeat(1, 1, num_groups, 1)
    output = _dot_product(query, keys_BKLD, values_BKLD, mask, scale, softcap)
    output = output.reshape(part.num_sessions, num_kv_heads, num_groups, part.num_rows, head_dim)
    return output.permute(0, 3, 1, 2, 4).reshape(num_rows, -1, head_dim)


def _read(cache_KSD: Tensor, part: Part, dtype: torch.dtype) -> Tensor:
    """`[B, K, L, D]`."""
    if isinstance(part.slots, tuple):
        return cache_KSD.narrow(1, *part.slots).to(dtype)[None]
    rows = cache_KSD.index_select(1, part.slots).to(dtype)
    return rows.reshape(rows.shape[0], part.num_sessions, -1, rows.shape[2]).transpose(0, 1)


def _dot_product(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Leading dimensions alike, a mask of what is added to the scores."""
    if softcap is None:
        return F.scaled_dot_product_attention(query, keys, values, mask, scale=scale)
    scores = softcap * torch.tanh(query @ keys.transpose(-2, -1) * (scale / softcap))
    if mask is not None:
        scores = scores + mask
    weights: Tensor = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights @ values
