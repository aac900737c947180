"""All weight files of a model under one roof: which tensors there are, and in which file. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from node.models.errors import ModelError
from node.models.gguf_file import GgufFile
from node.models.safetensors_file import SafetensorsFile
from node.models.tensors import TensorPlace, WeightFile


class Weights:
    """Opens every file (headers only). `num_bytes_read` counts the tensor bytes handed out since."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.num_bytes_read = 0
        self._files: dict[Path, WeightFile] = {}
        self.tensors: dict[str, TensorPlace] = {}
        for path in self.paths:
            file: WeightFile = GgufFile(path) if path.suffix == ".gguf" else SafetensorsFile(path)
            self._files[path] = file
            self.tensors.update(file.tensors)

    @property
    def gguf_architecture(self) -> str | None:
        """Set when the values are stored as llama.cpp's converter writes them for this architecture."""
        first = self._files[self.paths[0]]
        return first.architecture if isinstance(first, GgufFile) else None

    def place(self, name: str) -> TensorPlace:
        place = self.tensors.get(name)
        if place is None:
            raise ModelError(f"{self.paths[0].parent}: the weights lack the tensor {name}")
        return place

    def read(self, name: str) -> memoryview:
        place = self.place(name)
        self.num_bytes_read += place.size_bytes
        return self._files[place.path].read(place)

    def forget(self, name: str) -> None:
        place = self.place(name)
        self._files[place.path].forget(place)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
