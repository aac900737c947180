"""The device of this engine: which one, how much memory and how many threads, how fast it reads memory."""

from __future__ import annotations

import os
import time

import psutil
import torch

from node.models.errors import ModelError

DEVICE_ORDER = ("cuda", "mps", "xpu", "cpu")
MEMORY_SHARE = 0.8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
THREADS_VARIABLE = "POD_ENGINE_THREADS"
_PROBE_BYTES = 128 << 20


def choose_device(name: str) -> torch.device:
    """ "auto" takes the first of CUDA (or ROCm), MPS, XPU, CPU that is there. Raises ModelError."""
    available = [kind for kind in DEVICE_ORDER if _is_available(kind)]
    if name == "auto":
        return torch.device(available[0])
    if name.split(":")[0] not in available:
        raise ModelError(f"device {name!r} is not available here (available: {', '.join(available)})")
    return torch.device(name)


def default_memory_bytes(device: torch.device) -> int:
    """A share of what is free now; the rest is for activations and everybody else."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE)
    if device.type == "xpu":
        return int(torch.xpu.mem_get_info(device)[0] * MEMORY_SHARE)
    return int(psutil.virtual_memory().available * MEMORY_SHARE)


def choose_dtype(name: str, device: torch.device, num_parameters: int, free_bytes: int) -> torch.dtype:
    """ "auto": float32 on a CPU where that leaves half the memory for KV, else bfloat16 if there is.

    float16 is only taken when it was asked for: rows of models made for bfloat16 leave its range.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "mps" and not _has_bfloat16(device):
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    if device.type == "cpu" and num_parameters * 4 * 2 <= free_bytes:
        return torch.float32
    return torch.bfloat16


def is_out_of_memory(error: Exception) -> bool:
    """torch's CPU allocator raises plain RuntimeError; the text is all that tells."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def set_num_threads(num_threads: int | None) -> None:
    """The environment wins over the configuration, both over torch's own choice (one per core)."""
    chosen = os.environ.get(THREADS_VARIABLE) or num_threads
    if chosen is not None:
        torch.set_num_threads(max(1, int(chosen)))


def measure_bytes_per_second(device: torch.device) -> int:
    """How fast this device streams weights: a bound on decode speed, good enough to compare nodes with."""
    probe = torch.ones(_PROBE_BYTES // 4, device=device)
    probe.sum().item()
    start = time.perf_counter()
    probe.sum().item()
    return int(_PROBE_BYTES / (time.perf_counter() - start))


def _has_bfloat16(device: torch.device) -> bool:
    try:
        torch.ones(1, dtype=torch.bfloat16, device=device)
    except (RuntimeError, TypeError):
        return False
    return True


def _is_available(kind: str) -> bool:
    match kind:
        case "cuda":
            return torch.cuda.is_available()
        case "mps":
            return torch.backends.mps.is_available()
        case "xpu":
            return torch.xpu.is_available()
        case _:
            return True
