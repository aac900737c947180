"""Reading a GGUF file: metadata and tensor table with every size checked, tensors memory-mapped.

Names are given as transformers has them. Undoing what llama.cpp's converter did to the values (`undo`) and
unpacking the quantized blocks is left to the loader. gguf's own reader makes a numpy array of every token of
the vocabulary (seconds); this one walks over them.
"""

from __future__ import annotations

import mmap
import re
import struct
from math import prod
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from node.models.errors import ModelError
from node.models.mapped import forget_pages
from node.models.tensors import EMBEDDING, FINAL_NORM, HEAD, TensorPlace

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
# What gguf can unpack. Q4_0, Q4_1 and Q8_0 need no unpacking (`quantization.py`).
ENCODINGS = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4"),
)
MAGIC = int.from_bytes(b"GGUF", "little")
MAX_NUM_ENTRIES = 1 << 24
MAX_NUM_DIMENSIONS = 4
DEFAULT_ALIGNMENT_BYTES = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}

_TOP_NAMES = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": HEAD}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORM_NAMES = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_WEIGHTS = {
    "llama": _LAYER_NAMES,
    "qwen2": _LAYER_NAMES,
    "qwen3": _LAYER_NAMES | _HEAD_NORM_NAMES,
    "gemma3": _LAYER_NAMES
    | _HEAD_NORM_NAMES
    | {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
_BIASES = {"qwen2": ("attn_q", "attn_k", "attn_v")}
# Keys that change what the layers compute, and that are either taken over into the config or, with these
# values, say nothing new. One that is not here is not understood.
_MEANINGFUL_KEYS = re.compile(r"(rope|attention|expert|.*softcapping|.*_scale)\b|expert_\w+")
_KNOWN_KEYS = (
    "rope.dimension_count",
    "rope.freq_base",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "attention.key_length",
    "attention.value_length",
)
_NEUTRAL_VALUES = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.freq_base_swa": 10000.0,
    "expert_count": 0,
    "expert_used_count": 0,
}


class GgufFile:
    """`metadata` holds scalars and strings; arrays are skipped. Raises ModelError when it is damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
        self._position = 0
        self._array_keys: list[str] = []
        try:
            self.metadata, num_tensors = self._read_metadata()
            self.architecture = str(self.metadata.get("general.architecture"))
            self._check_keys()
            self.tensors = self._read_tensors(num_tensors)
        except (ValueError, OverflowError, struct.error) as error:
            self._map.close()
            raise ModelError(f"{path} is damaged or truncated ({error})") from error
        except ModelError:
            self._map.close()
            raise

    def read(self, place: TensorPlace) -> memoryview:
        return memoryview(self._map)[place.start : place.end]

    def forget(self, place: TensorPlace) -> None:
        forget_pages(self._map, place.start, place.end)

    def close(self) -> None:
        self._map.close()

    def _read_metadata(self) -> tuple[dict[str, object], int]:
        magic, version, num_tensors, num_values = self._unpack("<IIQQ")
        if magic != MAGIC or version not in (2, 3):
            raise ValueError("not GGUF version 2 or 3")
        if num_tensors > MAX_NUM_ENTRIES or num_values > MAX_NUM_ENTRIES:
            raise ValueError("impossible counts in its header")
        metadata: dict[str, object] = {}
        for _ in range(num_values):
            key = self._string()
            (kind,) = self._unpack("<I")
            value = self._value(kind)
            if value is not None:
                metadata[key] = value
            else:
                self._array_keys.append(key)
        return metadata, num_tensors

    def _value(self, kind: int) -> object:
        """One value; None for an array, which is walked over."""
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ValueError(f"unknown metadata type {kind}")
        element_kind, count = self._unpack("<IQ")
        if element_kind in _SCALARS:
            self._advance(count * struct.calcsize(_SCALARS[element_kind]))
        elif element_kind == _STRING:
            self._skip_strings(count)
        else:
            raise ValueError(f"unknown array type {element_kind}")
        return None

    def _check_keys(self) -> None:
        """A key that nobody reads would change the model's output without a word."""
        for key in (*self.metadata, *self._array_keys):
            prefix, _, name = key.partition(".")
            if prefix != self.architecture or not _MEANINGFUL_KEYS.match(name) or name in _KNOWN_KEYS:
                continue
            if (prefix, name) == ("gemma3", "attention.sliding_window"):
                continue
            value = self.metadata.get(key, "[...]")
            if name not in _NEUTRAL_VALUES or value != _NEUTRAL_VALUES[name]:
                raise ModelError(f"{self._path}: {key} = {value!r} is not supported")

    def _read_tensors(self, num_tensors: int) -> dict[str, TensorPlace]:
        if self.architecture not in ARCHITECTURES:
            raise ModelError(
                f"{self._path}: architecture {self.architecture!r} is not supported from GGUF "
                f"(supported: {', '.join(ARCHITECTURES)})"
            )
        table = [self._tensor_entry() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT_BYTES)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError("bad alignment")
        data_start = -(-self._position // alignment) * alignment
        places = [self._place(name, shape, kind, data_start + offset) for name, shape, kind, offset in table]
        return {place.name: place for place in places}

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (num_dimensions,) = self._unpack("<I")
        if not 0 < num_dimensions <= MAX_NUM_DIMENSIONS:
            raise ValueError(f"bad shape of {name}")
        shape = tuple(reversed(self._unpack(f"<{num_dimensions}Q")))
        kind, offset = self._unpack("<IQ")
        return name, shape, kind, offset

    def _place(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> TensorPlace:
        hf_name = _transformers_name(name, self.architecture)
        if hf_name is None:
            raise ModelError(f"{self._path}: the tensor {name} is not supported for {self.architecture!r}")
        try:
            encoding = GGMLQuantizationType(kind)
        except ValueError as error:
            raise ModelError(f"{self._path}: {name} has the unknown quantization type {kind}") from error
        if encoding.name not in ENCODINGS:
            raise ModelError(
                f"{self._path}: the quantization type {encoding.name} of {name} is not supported "
                f"(supported: {', '.join(ENCODINGS)})"
            )
        block_values, block_bytes = GGML_QUANT_SIZES[encoding]
        if shape[-1] % block_values:
            raise ValueError(f"{name} is not made of whole blocks")
        end = start + prod(shape) // block_values * block_bytes
        if end > len(self._map):
            raise ValueError(f"{name} ends at byte {end}, the file has {len(self._map)}")
        return TensorPlace(hf_name, shape, encoding.name, self._path, start, end)

    def _unpack(self, layout: str) -> tuple[int, ...]:
        values: tuple[int, ...] = struct.unpack_from(layout, self._map, self._position)
        self._position += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        start = self._position
        self._advance(length)
        return self._map[start : start + length].decode("utf-8", "replace")

    def _skip_strings(self, count: int) -> None:
        unpack, data, position = struct.Struct("<Q").unpack_from, self._map, self._position
        for _ in range(count):
            position += 8 + unpack(data, position)[0]
        self._position = position
        self._advance(0)

    def _advance(self, num_bytes: int) -> None:
        self._position += num_bytes
        if self._position > len(self._map):
            raise ValueError("shorter than its header")


def _transformers_name(name: str, architecture: str) -> str | None:
    """llama.cpp's tensor name -> transformers' name; None for a tensor the model class does not have."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = re.fullmatch(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)", name)
    names = _WEIGHTS[architecture]
    if match is None or match[2] not in names:
        return None
    if match[3] == "bias" and match[2] not in _BIASES.get(architecture, ()):
        return None
    return f"model.layers.{match[1]}.{names[match[2]]}.{match[3]}"
