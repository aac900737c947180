"""Attention as one operator of torch, which compiled code can call.

What it needs beside its tensors, the step and the layer, is set by the thread that runs the layer.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from node.engine.attention import PagedStep, attend


class _Running(threading.local):
    step: PagedStep | None = None
    layer: int = -1


running = _Running()
"""Of this thread: set before compiled code runs."""


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """`query` `[1, H, T, D]`, `key` and `value` `[1, K, T, D]` -> `[1, T, H, D]`."""
    step = running.step
    assert step is not None
    keys_KSD, values_KSD = step.write(running.layer, key[0], value[0])
    output_THD = attend(query[0], keys_KSD, values_KSD, step, scaling, window, softcap)
    # Compiled code was told so (`_shape_only`) and reads the memory without looking at strides.
    return output_THD.contiguous()[None]


def _shape_only(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])


_library = torch.library.Library("gpu_pod", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "attend(Tensor query, Tensor key, Tensor value, float? scaling, int? window, float? softcap) -> Tensor"
)
_library.impl("attend", _attend, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("gpu_pod::attend", _shape_only, lib=_library)


def attend_in_graph(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    return torch.as_tensor(torch.ops.gpu_pod.attend(query, key, value, scaling, window, softcap))
