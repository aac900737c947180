"""Reading a safetensors file: the header is checked against the file's size, tensors are memory-mapped.

It reads nothing but the header until a tensor is asked for, and knows nothing of models. (The format:
u64 header length, JSON header, then the bytes.)
"""

from __future__ import annotations

import json
import mmap
from math import prod
from pathlib import Path

from node.models.errors import ModelError
from node.models.mapped import forget_pages
from node.models.tensors import TensorPlace

MAX_HEADER_BYTES = 100_000_000
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


class SafetensorsFile:
    """Raises ModelError when the file is not a whole safetensors file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
        try:
            self.tensors = self._read_header()
        except (ValueError, TypeError, KeyError, RecursionError) as error:
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

    def _read_header(self) -> dict[str, TensorPlace]:
        file_bytes = len(self._map)
        if file_bytes < 8:
            raise ValueError("shorter than its header")
        header_bytes = int.from_bytes(self._map[:8], "little")
        data_start = 8 + header_bytes
        if header_bytes > MAX_HEADER_BYTES or data_start > file_bytes:
            raise ValueError("shorter than its header")
        header = json.loads(self._map[8:data_start])
        if not isinstance(header, dict):
            raise ValueError("header is not a map")
        header.pop("__metadata__", None)
        tensors = {name: self._place(name, entry, data_start) for name, entry in header.items()}
        end = max((place.end for place in tensors.values()), default=data_start)
        if end != file_bytes:
            raise ValueError(f"the header describes {end} bytes, the file has {file_bytes}")
        return tensors

    def _place(self, name: str, entry: dict[str, object], data_start: int) -> TensorPlace:
        encoding, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(encoding, str) or not isinstance(shape, list) or not isinstance(offsets, list):
            raise ValueError(f"bad entry for {name}")
        start, end = offsets
        if any(type(value) is not int or value < 0 for value in (*shape, start, end)):
            raise ValueError(f"bad entry for {name}")
        if encoding not in ITEM_BYTES:
            supported = ", ".join(ITEM_BYTES)
            raise ModelError(f"{self._path}: {name} is stored as {encoding!r} (known: {supported})")
        if end - start != prod(shape) * ITEM_BYTES[encoding]:
            raise ValueError(f"{name} has the wrong size")
        return TensorPlace(name, tuple(shape), encoding, self._path, data_start + start, data_start + end)
