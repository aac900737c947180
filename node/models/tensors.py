"""A tensor's place in a weight file, whatever the format: the small port that loading reads through."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

MODEL_PREFIX = "model."
LAYER_PREFIX = "model.layers."
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """`name` and `shape` as transformers has them; `[start, end)` are bytes of `path`, in `encoding`."""

    name: str
    shape: tuple[int, ...]
    encoding: str
    path: Path
    start: int
    end: int

    @property
    def num_parameters(self) -> int:
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


class WeightFile(Protocol):
    """One opened file: its tensors by transformers' name, and the raw bytes of each, mapped, not copied."""

    @property
    def tensors(self) -> dict[str, TensorPlace]: ...

    def read(self, place: TensorPlace) -> memoryview: ...

    def forget(self, place: TensorPlace) -> None:
        """The bytes were taken; they need not stay in memory."""
        ...

    def close(self) -> None: ...


def layer_of(name: str) -> int | None:
    """The decoder layer a tensor belongs to, or None for embedding, final norm and head."""
    if not name.startswith(LAYER_PREFIX):
        return None
    index = name[len(LAYER_PREFIX) :].split(".", 1)[0]
    return int(index) if index.isdecimal() else None
