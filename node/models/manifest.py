"""The manifest of a model package: what the pod must agree on to split a model. Its digest is the model id.

Canonical CBOR, so that every node derives the same id from the same files. Models of floats are written as
version 1, packed ones as version 2, which adds what their parts weigh. It knows sizes and counts, not paths:
where the files lie on one node is `package.py`'s business.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from node.models.errors import ModelError
from node.models.quantization import DTYPES, QUANTIZED_DTYPES
from pod.canonical import decode, encode

MAX_MANIFEST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileDigest:
    name: str
    size_bytes: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class PackedSizes:
    """Bytes in memory, with what stays float; `weight_type` is what most of it is ("int4", "int8")."""

    weight_type: str
    layer_num_bytes: tuple[int, ...]
    embedding_num_bytes: int
    head_num_bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """`dtype` is what the pod asked for ("auto": each node chooses). Tied embeddings count in both ends."""

    name: str
    model_type: str
    hidden_size: int
    vocab_size: int
    max_context_tokens: int
    dtype: str
    weights: tuple[FileDigest, ...]
    bundle: tuple[FileDigest, ...]
    layer_num_parameters: tuple[int, ...]
    embedding_num_parameters: int
    head_num_parameters: int
    num_kv_values_per_token_per_layer: int
    eos_token_ids: tuple[int, ...]
    packed: PackedSizes | None = None

    @property
    def version(self) -> int:
        return 1 if self.packed is None else 2

    @property
    def weight_type(self) -> str:
        """What the weights are kept as; "auto" of a model of floats is each node's choice."""
        return self.dtype if self.packed is None else self.packed.weight_type

    @property
    def num_layers(self) -> int:
        return len(self.layer_num_parameters)

    @property
    def model_id(self) -> bytes:
        return hashlib.sha256(self.encode()).digest()

    @property
    def parameter_bytes(self) -> int:
        """Bytes per float parameter and KV value to plan with; "auto" is planned at two, its least."""
        return 4 if self.dtype == "float32" else 2

    @property
    def kv_bytes_per_token_per_layer(self) -> int:
        return self.num_kv_values_per_token_per_layer * self.parameter_bytes

    def stage_num_parameters(self, start_layer: int, end_layer: int) -> int:
        """The embedding counts in the first stage, final norm and head in the last."""
        count = sum(self.layer_num_parameters[start_layer:end_layer])
        if start_layer == 0:
            count += self.embedding_num_parameters
        if end_layer == self.num_layers:
            count += self.head_num_parameters
        return count

    @property
    def layer_num_bytes(self) -> tuple[int, ...]:
        """Planned memory of each layer's weights."""
        if self.packed is not None:
            return self.packed.layer_num_bytes
        return tuple(count * self.parameter_bytes for count in self.layer_num_parameters)

    @property
    def embedding_num_bytes(self) -> int:
        if self.packed is not None:
            return self.packed.embedding_num_bytes
        return self.embedding_num_parameters * self.parameter_bytes

    @property
    def head_num_bytes(self) -> int:
        if self.packed is not None:
            return self.packed.head_num_bytes
        return self.head_num_parameters * self.parameter_bytes

    def stage_bytes(self, start_layer: int, end_layer: int) -> int:
        num_bytes = sum(self.layer_num_bytes[start_layer:end_layer])
        if start_layer == 0:
            num_bytes += self.embedding_num_bytes
        if end_layer == self.num_layers:
            num_bytes += self.head_num_bytes
        return num_bytes

    def encode(self) -> bytes:
        fields: dict[int, object] = {
            0: self.version,
            1: self.name,
            2: self.model_type,
            3: self.hidden_size,
            4: self.vocab_size,
            5: self.max_context_tokens,
            6: self.dtype,
            7: [[file.name, file.size_bytes, file.sha256] for file in self.weights],
            8: [[file.name, file.size_bytes, file.sha256] for file in self.bundle],
            9: list(self.layer_num_parameters),
            10: self.embedding_num_parameters,
            11: self.head_num_parameters,
            12: self.num_kv_values_per_token_per_layer,
            13: list(self.eos_token_ids),
        }
        if self.packed is not None:
            sizes = self.packed
            fields[14] = [
                sizes.weight_type,
                list(sizes.layer_num_bytes),
                sizes.embedding_num_bytes,
                sizes.head_num_bytes,
            ]
        return encode(fields)

    @staticmethod
    def decode(raw: bytes) -> Manifest:
        """Raises ModelError when the bytes are not exactly what `encode` writes."""
        if len(raw) > MAX_MANIFEST_BYTES:
            raise ModelError(f"the model manifest is longer than {MAX_MANIFEST_BYTES} bytes")
        try:
            manifest = _from_fields(decode(raw, MAX_MANIFEST_BYTES))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"the model manifest is damaged: {error}") from error
        if manifest.encode() != raw:
            raise ModelError("the model manifest is not in canonical form")
        return manifest


def _from_fields(fields: object) -> Manifest:
    if not isinstance(fields, dict) or fields.get(0) not in (1, 2):
        raise ValueError("version")
    if set(fields) != set(range(13 + fields[0])):
        raise ValueError("fields")
    manifest = Manifest(
        name=_text(fields[1]),
        model_type=_text(fields[2]),
        hidden_size=_count(fields[3], 1),
        vocab_size=_count(fields[4], 1),
        max_context_tokens=_count(fields[5], 1),
        dtype=_text(fields[6]),
        weights=tuple(_digest(item) for item in _items(fields[7])),
        bundle=tuple(_digest(item) for item in _items(fields[8])),
        layer_num_parameters=tuple(_count(item, 1) for item in _items(fields[9])),
        embedding_num_parameters=_count(fields[10]),
        head_num_parameters=_count(fields[11]),
        num_kv_values_per_token_per_layer=_count(fields[12], 1),
        eos_token_ids=tuple(_count(item) for item in _items(fields[13])),
        packed=_packed_sizes(fields[14]) if 14 in fields else None,
    )
    if manifest.dtype not in DTYPES or not manifest.layer_num_parameters:
        raise ValueError("dtype or layers")
    if len(manifest.layer_num_bytes) != manifest.num_layers:
        raise ValueError("sizes")
    return manifest


def _packed_sizes(value: object) -> PackedSizes:
    if not isinstance(value, list) or len(value) != 4 or value[0] not in QUANTIZED_DTYPES:
        raise ValueError("sizes")
    weight_type, layers, embedding, head = value
    return PackedSizes(
        weight_type, tuple(_count(item, 1) for item in _items(layers)), _count(embedding), _count(head)
    )


def _count(value: object, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 1 << 60:
        raise ValueError("count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        raise ValueError("text")
    return value


def _items(value: object) -> list[object]:
    if not isinstance(value, list) or len(value) > 4096:
        raise ValueError("list")
    return value


def _digest(value: object) -> FileDigest:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError("file")
    name, size_bytes, sha256 = value
    if not isinstance(sha256, bytes) or len(sha256) != 32:
        raise ValueError("digest")
    name = _text(name)
    if name in (".", "..") or "/" in name or "\\" in name or "\x00" in name:
        raise ValueError("file name")
    return FileDigest(name, _count(size_bytes), sha256)
