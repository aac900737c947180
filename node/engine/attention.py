"""Attention over the paged KV cache, registered in transformers' attention interface under `NAME`.

The batch is one packed row: the tokens of all sessions one after another. Each session attends to its own
true length, causally within a prefill chunk. Model families reach it through transformers' interface, so
nothing here knows one of them. T tokens, H heads, K KV heads, L length attended to, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from node.engine.kv_cache import BlockTable, KvCache

NAME = "gpu_pod_paged"


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one session inside the packed row; the first stands at `position`."""

    table: BlockTable
    position: int
    num_tokens: int


class PagedStep:
    """What attention needs to know of one step, the same for all layers."""

    def __init__(self, cache: KvCache, spans: Sequence[Span]) -> None:
        self.cache = cache
        self.spans = spans
        self.slots_T = torch.cat([s.table.slots(s.position, s.position + s.num_tokens) for s in spans])
        self._masks: dict[tuple[int, int], Tensor] = {}

    def mask(self, span: Span, first: int) -> Tensor:
        """`[T, L]` for the keys `[first, end)`: a token sees itself and what is before it, in its window."""
        length = span.position + span.num_tokens - first
        key = (id(span), first)
        if key not in self._masks:
            ones = torch.ones(span.num_tokens, length, dtype=torch.bool, device=self.slots_T.device)
            self._masks[key] = ones.tril(span.position - first)
        return self._masks[key]


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    paged: PagedStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """`query` `[1, H, T, D]`, `key` and `value` `[1, K, T, D]` -> `[1, T, H, D]`."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    keys_KSD, values_KSD = paged.cache.layer(layer)
    keys_KSD.index_copy_(1, paged.slots_T, key[0])
    values_KSD.index_copy_(1, paged.slots_T, value[0])
    outputs, row = [], 0
    for span in paged.spans:
        end = span.position + span.num_tokens
        first = 0 if sliding_window is None else max(0, span.position - sliding_window + 1)
        output = _attend(
            query[0, :, row : row + span.num_tokens],
            span.table.gather(keys_KSD, first, end),
            span.table.gather(values_KSD, first, end),
            _mask_of(paged, span, first, sliding_window),
            scaling,
            softcap,
        )
        outputs.append(output)
        row += span.num_tokens
    return torch.cat(outputs, dim=1).transpose(0, 1)[None], None


def _mask_of(paged: PagedStep, span: Span, first: int, sliding_window: int | None) -> Tensor | None:
    if span.num_tokens == 1:
        return None
    mask = paged.mask(span, first)
    if sliding_window is not None and span.position + span.num_tokens > sliding_window:
        mask = mask & ~mask.tril(span.position - first - sliding_window)
    return mask


def _attend(
    query_HTD: Tensor,
    keys_KLD: Tensor,
    values_KLD: Tensor,
    mask_TL: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """-> `[H, T, D]`. Query heads that share a KV head run as rows against it: KV is never copied."""
    num_heads, num_tokens, head_dim = query_HTD.shape
    num_groups = num_heads // keys_KLD.shape[0]
    rows_KRD = query_HTD.reshape(-1, num_groups * num_tokens, head_dim)
    mask_RL = None if mask_TL is None else mask_TL.repeat(num_groups, 1)
    if softcap is None:
        output = F.scaled_dot_product_attention(
            rows_KRD[None], keys_KLD[None], values_KLD[None], mask_RL, scale=scaling
        )[0]
    else:
        output = _capped(rows_KRD, keys_KLD, values_KLD, mask_RL, scaling or head_dim**-0.5, softcap)
    return output.reshape(num_heads, num_tokens, head_dim)


def _capped(
    rows_KRD: Tensor,
    keys_KLD: Tensor,
    values_KLD: Tensor,
    mask_RL: Tensor | None,
    scaling: float,
    softcap: float,
) -> Tensor:
    scores = softcap * torch.tanh(rows_KRD @ keys_KLD.transpose(1, 2) * scaling / softcap)
    if mask_RL is not None:
        scores = scores.masked_fill(~mask_RL, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(rows_KRD.dtype) @ values_KLD


AttentionInterface.register(NAME, paged_attention)
