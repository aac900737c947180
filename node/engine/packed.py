"""Weights of four or eight bits in groups of 32 along the inner dimension: value = scale * code + minimum.

Made from floats or straight from a GGUF file's blocks (a reshuffling of bytes, nothing is dequantized). It
knows no model and multiplies nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from node.models.quantization import GROUP as GROUP
from node.models.quantization import can_pack

_HALF = GROUP // 2
# Half a megabyte of float32 stays in the caches between one step of the arithmetic and the next.
_CHUNK_VALUES = 1 << 17
_NUM_REFITS = 2


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight `[N, K]` on the CPU, K a multiple of 32.

    `codes`: of four bits uint8 `[N, K/2]`, where byte j of a group's 16 holds code j (low) and j + 16 (high),
    as in GGUF; of eight bits int8 `[N, K]`. `scales` and `minima` are float16 `[N, K/32]`; None is all zero.
    """

    bits: int
    codes: Tensor
    scales: Tensor
    minima: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        num_rows, num_groups = self.scales.shape
        return num_rows, num_groups * GROUP

    @property
    def num_bytes(self) -> int:
        parts = (self.codes, self.scales, self.minima)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def is_finite(self) -> bool:
        """Codes always are; a scale or minimum may be NaN or infinite in a damaged file."""
        parts = (self.scales, self.minima)
        return all(bool(part.isfinite().all()) for part in parts if part is not None)

    def rows(self, indices: Tensor) -> PackedWeight:
        """These rows in this order, a copy."""
        minima = None if self.minima is None else _rows(self.minima, indices)
        return PackedWeight(self.bits, _rows(self.codes, indices), _rows(self.scales, indices), minima)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`[N, K]`, computed in float32."""
        num_rows, num_columns = self.shape
        values = torch.empty(num_rows, num_columns, dtype=dtype, device=self.codes.device)
        step = max(1, _CHUNK_VALUES // num_columns)
        for start in range(0, num_rows, step):
            part = slice(start, start + step)
            values[part] = self._float_rows(part)
        return values

    def unpacked_codes(self) -> Tensor:
        """int32 `[N, K]`: 0..15, or -127..127."""
        return self._codes_of(slice(None)).to(torch.int32).flatten(1)

    def _float_rows(self, part: slice) -> Tensor:
        values_NGI = self._codes_of(part).mul_(self.scales[part].float()[..., None])
        if self.minima is not None:
            values_NGI += self.minima[part].float()[..., None]
        return values_NGI.flatten(1)

    def _codes_of(self, part: slice) -> Tensor:
        """`[n, K/32, 32]` in float32."""
        num_groups = self.scales.shape[1]
        codes = self.codes[part]
        if self.bits == 8:
            return codes.view(-1, num_groups, GROUP).float()
        bytes_NGJ = codes.view(-1, num_groups, _HALF)
        codes_NGI = torch.empty(*bytes_NGJ.shape[:2], GROUP, device=codes.device)
        codes_NGI[..., :_HALF] = bytes_NGJ & 0xF
        codes_NGI[..., _HALF:] = bytes_NGJ >> 4
        return codes_NGI


def from_float(weight_NK: Tensor, bits: int) -> PackedWeight:
    """Quantize; besides the result it holds floats of a few rows. A NaN or infinity makes its scale one."""
    assert can_pack(tuple(weight_NK.shape)), weight_NK.shape
    num_rows, num_columns = weight_NK.shape
    step = max(1, _CHUNK_VALUES // num_columns)
    parts = [
        (_quantize4 if bits == 4 else _quantize8)(weight_NK[start : start + step])
        for start in range(0, num_rows, step)
    ]
    codes, scales, minima = (torch.cat(same) for same in zip(*parts, strict=True))
    return PackedWeight(bits, codes, scales, minima if bits == 4 else None)


def from_gguf(raw: np.ndarray, encoding: str, shape: tuple[int, int]) -> PackedWeight:
    """The blocks of a GGUF tensor (uint8, Q4_0, Q4_1 or Q8_0), taken apart into codes, scales and minima."""
    num_rows, num_columns = shape
    num_groups = num_columns // GROUP
    blocks = raw.reshape(num_rows, num_groups, -1)
    scales = _halves(blocks[..., :2])
    if encoding == "Q8_0":
        codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(num_rows, num_columns)
        return PackedWeight(8, torch.from_numpy(codes), scales, None)
    # Q4_0 has codes around 8. Eight times a float16 is one too, unless it leaves the range.
    minima = _halves(blocks[..., 2:4]) if encoding == "Q4_1" else -8 * scales
    first = 4 if encoding == "Q4_1" else 2
    codes = np.ascontiguousarray(blocks[..., first:]).reshape(num_rows, num_columns // 2)
    return PackedWeight(4, torch.from_numpy(codes), scales, minima)


def _rows(part: Tensor, indices: Tensor) -> Tensor:
    """torch gathers value by value; eight bytes at a time are as good as one."""
    row_bytes = part.shape[1] * part.element_size()
    wide = part.view(torch.int64) if row_bytes % 8 == 0 and part.is_contiguous() else part
    return wide.index_select(0, indices).view(part.dtype)


def _halves(pairs: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pairs).view(np.float16)[..., 0].copy())


Parts = tuple[Tensor, Tensor, Tensor]
"""Codes, scales and minima of a few rows."""


def _quantize8(rows_NK: Tensor) -> Parts:
    values_IG = _grouped(rows_NK)
    scales = (values_IG.abs().amax(0) / 127).half()
    codes = _codes(values_IG, scales, torch.zeros_like(scales), -127, 127).to(torch.int8)
    num_rows, num_columns = rows_NK.shape
    return codes.T.reshape(num_rows, num_columns), scales.view(num_rows, -1), scales[:0]


def _quantize4(rows_NK: Tensor) -> Parts:
    """From the range of each group, then least squares over its codes, where that lessens the error."""
    values_IG = _grouped(rows_NK)
    low, high = values_IG.aminmax(dim=0)
    scales, minima = ((high - low) / 15).half(), low.half()
    codes = _codes(values_IG, scales, minima, 0, 15)
    error = _squared_error(values_IG, codes, scales, minima)
    for _ in range(_NUM_REFITS):
        new_scales, new_minima = _refit(values_IG, codes)
        new_codes = _codes(values_IG, new_scales, new_minima, 0, 15)
        new_error = _squared_error(values_IG, new_codes, new_scales, new_minima)
        is_better = new_error < error
        codes = torch.where(is_better, new_codes, codes)
        scales = torch.where(is_better, new_scales, scales)
        minima = torch.where(is_better, new_minima, minima)
        error = torch.minimum(error, new_error)
    whole = codes.to(torch.uint8)
    num_rows = len(rows_NK)
    pairs = (whole[:_HALF] | whole[_HALF:] << 4).T.reshape(num_rows, -1)
    return pairs, scales.view(num_rows, -1), minima.view(num_rows, -1)


def _grouped(rows_NK: Tensor) -> Tensor:
    """float32 `[32, groups]`: sums over a group then run over whole vectors of groups."""
    return rows_NK.float().reshape(-1, GROUP).T.contiguous()


def _codes(values_IG: Tensor, scales_G: Tensor, minima_G: Tensor, least: int, most: int) -> Tensor:
    """In float32, with the scales as they are stored, so that their rounding is made good for."""
    steps = torch.where(scales_G == 0, 0, 1 / scales_G.float())
    return (values_IG - minima_G.float()).mul_(steps).round_().clamp_(least, most)


def _squared_error(values_IG: Tensor, codes_IG: Tensor, scales_G: Tensor, minima_G: Tensor) -> Tensor:
    stored = torch.addcmul(minima_G.float(), codes_IG, scales_G.float())
    return stored.sub_(values_IG).square_().sum(0)


def _refit(values_IG: Tensor, codes_IG: Tensor) -> tuple[Tensor, Tensor]:
    mean_code, mean_value = codes_IG.mean(0), values_IG.mean(0)
    offsets = codes_IG - mean_code
    slope = (offsets * values_IG).sum(0) / offsets.square_().sum(0).clamp_min_(1e-9)
    return slope.half(), (mean_value - slope * mean_code).half()
