"""A linear layer and an embedding over packed weights, for machines and devices without kernels of our own.

A CPU with vector units multiplies through torch's four-bit kernel (eight bits are two times four); everything
else unpacks the weight for the call and forgets it again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from node.engine.packed import PackedWeight
from node.models.quantization import GROUP

_KERNEL_ROWS_MULTIPLE = 16
_KERNEL_CAPABILITIES = ("AVX2", "AVX512")
# A code of eight bits is 16 * high + low - 128. The kernel takes 8 from either half; one zero serves both.
_ZERO_OF_HALVES = 8 / 17


def packed_module(
    module: nn.Module, packed: PackedWeight, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """What stands in for an `nn.Linear` (its bias is set later) or an `nn.Embedding`."""
    if isinstance(module, nn.Embedding):
        # Gemma's embedding scales what it looks up.
        scale = getattr(module, "embed_scale", None)
        return PackedEmbedding(packed, dtype, device, scale if isinstance(scale, Tensor) else None)
    assert isinstance(module, nn.Linear), type(module)
    return (
        KernelLinear(packed) if device.type == "cpu" and _has_kernel(packed) else PackedLinear(packed, device)
    )


class _Packed(nn.Module):
    """Parts as parameters, so that they count as the module's memory."""

    def __init__(self, packed: PackedWeight, device: torch.device) -> None:
        super().__init__()
        self._bits = packed.bits
        self.codes = _frozen(packed.codes.to(device))
        self.scales = _frozen(packed.scales.to(device))
        self.minima = None if packed.minima is None else _frozen(packed.minima.to(device))

    def packed(self) -> PackedWeight:
        return PackedWeight(self._bits, self.codes.data, self.scales.data, self.minima)


class PackedLinear(_Packed):
    """`x @ weight.T + bias`, the weight unpacked for each call."""

    def __init__(self, packed: PackedWeight, device: torch.device) -> None:
        super().__init__(packed, device)
        self.bias: Tensor | None
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.packed().dequantize(x.dtype), self.bias)


class PackedEmbedding(_Packed):
    def __init__(
        self, packed: PackedWeight, dtype: torch.dtype, device: torch.device, scale: Tensor | None
    ) -> None:
        super().__init__(packed, device)
        self._dtype = dtype
        self._scale = None if scale is None else scale.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.packed().rows(ids.flatten()).dequantize(self._dtype).view(*ids.shape, -1)
        return rows if self._scale is None else rows * self._scale


class KernelLinear(nn.Module):
    """`x @ weight.T + bias` through torch's kernel for four bits, which computes in bfloat16."""

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        self.bias: Tensor | None
        self.register_parameter("bias", None)
        self.parts = nn.ParameterList(_frozen(part) for part in _parts_for_kernel(packed))
        pairs_NG2 = torch.stack([packed.scales.float(), _zeros(packed)], dim=-1)
        self.scales_and_zeros = _frozen(pairs_NG2.transpose(0, 1).contiguous().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).bfloat16()
        low, *high = [self._multiply(rows, part).to(x.dtype) for part in self.parts]
        product = (low + 16 * high[0] if high else low).view(*x.shape[:-1], -1)
        return product if self.bias is None else product + self.bias

    def _multiply(self, rows: Tensor, part: Tensor) -> Tensor:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return torch.as_tensor(multiply(rows, part, GROUP, self.scales_and_zeros))


def _has_kernel(packed: PackedWeight) -> bool:
    """Elsewhere the kernel is a plain loop."""
    is_fast = torch.backends.cpu.get_cpu_capability() in _KERNEL_CAPABILITIES
    has_kernel = hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
    return is_fast and has_kernel and packed.shape[0] % _KERNEL_ROWS_MULTIPLE == 0


def _parts_for_kernel(packed: PackedWeight) -> list[Tensor]:
    codes_NK = packed.unpacked_codes()
    parts = [codes_NK] if packed.bits == 4 else [(codes_NK + 128) & 0xF, (codes_NK + 128) >> 4]
    return [torch.ops.aten._convert_weight_to_int4pack_for_cpu(part, 1) for part in parts]


def _zeros(packed: PackedWeight) -> Tensor:
    """The kernel computes scale * (code - 8) + zero."""
    scales = packed.scales.float()
    if packed.bits == 8:
        return scales * _ZERO_OF_HALVES
    return scales * 8 + (0 if packed.minima is None else packed.minima.float())


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
