"""Which weights are packed into four or eight bits, and what they weigh: one rule for planning and loading.

`max_num_bits` is the most that a packed model spends on one weight; None stands for a model of floats. What a
file packs as tightly stays as it is stored. No torch: the node process plans with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from node.models.tensors import EMBEDDING, HEAD, TensorPlace, layer_of

GROUP = 32
# Scale and minimum of two bytes each and 16 bytes of codes; a scale and 32 of codes.
GROUP_BYTES = {4: 20, 8: 34}
GGUF_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
QUANTIZED_DTYPES = {"int4": 4, "int8": 8}
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "int4")


def can_pack(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[1] % GROUP == 0


def packed_num_bytes(shape: tuple[int, ...], num_bits: int) -> int:
    return prod(shape) // GROUP * GROUP_BYTES[num_bits]


def max_num_bits(dtype: str, places: Iterable[TensorPlace]) -> int | None:
    """ "auto" packs what comes packed: a file with most of its values in encodings that need no unpacking."""
    if dtype in QUANTIZED_DTYPES:
        return QUANTIZED_DTYPES[dtype]
    return 8 if dtype == "auto" and _is_mostly_packed(places) else None


def num_bits_of(place: TensorPlace, most: int | None) -> int | None:
    """The bits one tensor is kept in; None: floats. Embedding and head are not quantized below eight."""
    if most is None or not can_pack(place.shape):
        return None
    stored = GGUF_BITS.get(place.encoding)
    if stored is not None and stored <= most:
        return stored
    return 8 if place.name in (EMBEDDING, HEAD) else most


def num_bytes_of(place: TensorPlace, most: int | None, float_bytes: int) -> int:
    """In memory, with `float_bytes` for each value that is not packed."""
    num_bits = num_bits_of(place, most)
    return place.num_parameters * float_bytes if num_bits is None else packed_num_bytes(place.shape, num_bits)


def weight_type(most: int | None, places: Iterable[TensorPlace]) -> str:
    """ "int4" or "int8": as what the most values of packed weights are kept."""
    num_values = dict.fromkeys(QUANTIZED_DTYPES, 0)
    for place in places:
        num_bits = num_bits_of(place, most)
        if num_bits is not None:
            num_values[f"int{num_bits}"] += place.num_parameters
    return max(num_values, key=lambda name: num_values[name])


def _is_mostly_packed(places: Iterable[TensorPlace]) -> bool:
    layers = [place for place in places if layer_of(place.name) is not None]
    num_packed = sum(place.num_parameters for place in layers if place.encoding in GGUF_BITS)
    return 2 * num_packed > sum(place.num_parameters for place in layers)
