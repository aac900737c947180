"""The C side of the kernels as Python sees it: structures (src/model.h), signatures (src/kernels.cpp)."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from struct import Struct

ABI_VERSION = 2
# blocks, position, num_tokens, num_prompt_tokens: `Span` in src/model.h
SPAN = Struct("@Piii4x")


class Weight(ctypes.Structure):
    _fields_ = (
        ("bits", c_int32),
        ("n", c_int32),
        ("k", c_int32),
        ("padding", c_int32),
        ("data", c_void_p),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, Weight) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, c_void_p) for name in ("query_bias", "key_bias", "value_bias", "output_bias")),
        *((name, c_void_p) for name in ("norm_before_attention", "norm_after_attention")),
        *((name, c_void_p) for name in ("norm_before_mlp", "norm_after_mlp", "query_norm", "key_norm")),
        *((name, c_void_p) for name in ("keys", "values", "inverse_frequencies")),
        ("rotary_dim", c_int32),
        ("rotary_scale", c_float),
        ("window", c_int32),
        ("rope_kind", c_int32),
    )


class Model(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads")),
        *((name, c_int32) for name in ("head_dim", "num_layers", "activation")),
        *((name, c_float) for name in ("norm_epsilon", "attention_scale", "attention_softcap")),
        *((name, c_float) for name in ("embedding_scale", "final_softcap")),
        ("num_slots", c_int64),
        ("embedding", Weight),
        ("head", Weight),
        ("final_norm", c_void_p),
        ("layers", POINTER(Layer)),
    )


class Kernels:
    """The loaded library. Its functions release the GIL while they run."""

    def __init__(self, path: Path) -> None:
        """Raises OSError for a file that is no library or not these kernels."""
        library = ctypes.CDLL(str(path))
        try:
            version = library.gp_abi()
        except AttributeError as error:
            raise OSError(f"{path} does not have the kernels") from error
        if version != ABI_VERSION:
            raise OSError(f"{path} is of version {version}, not {ABI_VERSION}")
        self.weight_bytes = _function(library.gp_weight_bytes, c_int64, c_int32, c_int32, c_int32)
        self.pack_groups = _function(
            library.gp_pack_groups, None, c_int32, c_int32, c_int32, c_void_p, c_void_p, c_void_p, c_void_p
        )
        self.pack_floats = _function(
            library.gp_pack_floats, None, c_int32, c_int32, c_int32, c_void_p, c_void_p
        )
        self.new = _function(library.gp_new, c_void_p, POINTER(Model), c_int32)
        self.free = _function(library.gp_free, None, c_void_p)
        self.embed = _function(library.gp_embed, None, c_void_p, c_void_p, c_int32, c_void_p)
        self.set_num_slots = _function(library.gp_set_num_slots, None, c_void_p, c_int64)
        self.run = _function(library.gp_run, c_int32, c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_int32)
        self.logits = _function(library.gp_logits, c_int32, c_void_p, c_void_p, c_int32, c_void_p)


def _function(
    function: ctypes._NamedFuncPointer, result: type | None, *arguments: type
) -> ctypes._NamedFuncPointer:
    function.restype = result
    function.argtypes = arguments
    return function
