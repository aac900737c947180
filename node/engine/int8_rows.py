"""Hidden states in 8 bits for slow links: int8 codes and a float16 scale for each group of 64 values.

A scale is rounded up, so that the largest value of a group is never cut off: a value comes back within half a
scale, which is 1/253 of the largest of its group (or 3e-8, where scales are too small for float16). Knows no
frames and no links.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from node.links.frames import SCALE_GROUP

_MAX_CODE = 127.0
_LEAST_SCALE = 2.0**-24


def quantize_rows(rows_TD: Tensor) -> Tensor | None:
    """int8 `[T, D + 2 * ceil(D / 64)]`: each row's codes, then its scales. None when a value is not finite or
    too large for any scale (beyond 8e6), which only floats can say.
    """
    num_rows, hidden_size = rows_TD.shape
    rows_TGS = pad(rows_TD.detach().cpu().float(), (0, -hidden_size % SCALE_GROUP)).view(
        num_rows, -1, SCALE_GROUP
    )
    peaks_TG = rows_TGS.abs().amax(-1)
    scales_TG = (peaks_TG / _MAX_CODE).half()
    is_below_TG = scales_TG.float() * _MAX_CODE < peaks_TG
    # The bits of the next larger float16.
    scales_TG = (scales_TG.view(torch.int16) + is_below_TG).view(torch.float16)
    if not bool(torch.isfinite(scales_TG).all()):
        return None
    divisors_TG1 = scales_TG.float().clamp(min=_LEAST_SCALE).unsqueeze(-1)
    codes_TD = (rows_TGS / divisors_TG1).round().to(torch.int8).view(num_rows, -1)[:, :hidden_size]
    return torch.cat((codes_TD, scales_TG.view(torch.int8)), dim=1)


def dequantize_rows(raw_TB: Tensor, hidden_size: int) -> Tensor:
    """float32 `[T, hidden_size]` from what `quantize_rows` made. Not finite where a scale is not."""
    codes_TD = raw_TB[:, :hidden_size].float()
    return codes_TD * scales_of(raw_TB, hidden_size).repeat_interleave(SCALE_GROUP, 1)[:, :hidden_size]


def scales_of(raw_TB: Tensor, hidden_size: int) -> Tensor:
    """float32 `[T, ceil(hidden_size / 64)]`."""
    # A copy, because two bytes may begin at an odd place.
    return raw_TB[:, hidden_size:].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
