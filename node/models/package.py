"""A model package on disk: `models_dir/<hex model id>/` has the manifest and bundle (config, tokenizer).

The weights stay where the reference found them; a node trusts them only after comparing digests with the
manifest (remembered by path, size and time). Bundles are small and may come from another node. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from node.models.bundle import ModelFacts, make_bundle_apart
from node.models.errors import ModelError
from node.models.manifest import FileDigest, Manifest, PackedSizes
from node.models.quantization import DTYPES, max_num_bits, num_bytes_of, weight_type
from node.models.reference import ModelFiles, resolve
from node.models.tensors import EMBEDDING, FINAL_NORM, HEAD, TensorPlace, layer_of
from node.models.weights import Weights

Progress = Callable[[str, int, int], None]
"""`progress(what, bytes_done, bytes_total)`."""

MakeBundle = Callable[[Path, Path], ModelFacts]

MANIFEST_FILE = "manifest.cbor"
DIGESTS_FILE = "digests.json"
MAX_BUNDLE_FILE_BYTES = 64 << 20
READ_BYTES = 4 << 20
MAX_NUM_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class ModelPackage:
    """`directory` holds manifest and bundle; `weights` are in the order of `manifest.weights`."""

    manifest: Manifest
    directory: Path
    weights: tuple[Path, ...]


def build_package(
    ref: str,
    dtype: str,
    models_dir: Path,
    progress: Progress | None = None,
    make_bundle: MakeBundle = make_bundle_apart,
) -> ModelPackage:
    """Describe the model that `ref` names. Raises ModelError; leaves nothing behind when it does."""
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r} (one of {', '.join(DTYPES)})")
    files = resolve(ref)
    weights = Weights(files.weights)
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        packed = _packed_sizes(weights, dtype)
        known = _installed(files, dtype, packed, models_dir, progress)
        if known is not None:
            return ModelPackage(known, package_dir(known.model_id, models_dir), files.weights)
        with tempfile.TemporaryDirectory(dir=models_dir, prefix="new-") as scratch:
            bundle_dir = Path(scratch)
            facts = make_bundle(files.source, bundle_dir)
            digests = _digests(files.weights, models_dir, progress)
            manifest = _describe(files, weights, facts, dtype, packed, digests, bundle_dir)
            return ModelPackage(manifest, _install(manifest, bundle_dir, models_dir), files.weights)
    finally:
        weights.close()


def _installed(
    files: ModelFiles, dtype: str, packed: PackedSizes | None, models_dir: Path, progress: Progress | None
) -> Manifest | None:
    """A package made of the same GGUF file: all its facts are in that file, so it need not be made again."""
    for path in models_dir.glob(f"*/{MANIFEST_FILE}") if files.is_gguf else ():
        try:
            manifest = load_package(bytes.fromhex(path.parent.name), models_dir)
        except (ModelError, ValueError):
            continue
        is_alike = (manifest.name, manifest.dtype, manifest.packed) == (files.name, dtype, packed)
        if is_alike and manifest.weights == _digests(files.weights, models_dir, progress):
            return manifest
    return None


def load_package(model_id: bytes, models_dir: Path) -> Manifest:
    """The manifest of an installed package. Raises ModelError when it is missing or damaged."""
    path = package_dir(model_id, models_dir) / MANIFEST_FILE
    try:
        manifest = Manifest.decode(path.read_bytes())
    except OSError as error:
        raise ModelError(f"model {model_id.hex()[:12]} is not installed here ({path})") from error
    if manifest.model_id != model_id:
        raise ModelError(f"{path} does not match its model id")
    return manifest


def package_dir(model_id: bytes, models_dir: Path) -> Path:
    return models_dir / model_id.hex()


def ensure_weights(
    manifest: Manifest, ref: str, models_dir: Path, progress: Progress | None = None
) -> tuple[Path, ...]:
    """Find the manifest's weight files on this machine and compare their digests. Raises ModelError."""
    files = resolve(ref)
    if [path.name for path in files.weights] != [file.name for file in manifest.weights]:
        raise ModelError(f"{ref} has other weight files here than the pod's {manifest.name}")
    for path, expected in zip(files.weights, manifest.weights, strict=True):
        if path.stat().st_size != expected.size_bytes:
            raise ModelError(
                f"{path} has {path.stat().st_size} bytes, the pod's file has {expected.size_bytes}"
            )
    for path, digest, expected in zip(
        files.weights, _digests(files.weights, models_dir, progress), manifest.weights, strict=True
    ):
        if digest.sha256 != expected.sha256:
            raise ModelError(f"{path} is damaged or another version: its sha256 is not the pod's")
    return files.weights


def read_bundle(manifest: Manifest, models_dir: Path) -> dict[str, bytes]:
    directory = package_dir(manifest.model_id, models_dir)
    try:
        return {file.name: (directory / file.name).read_bytes() for file in manifest.bundle}
    except OSError as error:
        raise ModelError(f"the bundle of {manifest.name} is not whole: {error}") from error


def write_bundle(manifest: Manifest, contents: Mapping[str, bytes], models_dir: Path) -> Path:
    """Install a bundle that came from elsewhere. Raises ModelError when a file is not the manifest's."""
    models_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models_dir, prefix="new-") as scratch:
        for file in manifest.bundle:
            raw = contents.get(file.name, b"")
            if len(raw) != file.size_bytes or hashlib.sha256(raw).digest() != file.sha256:
                raise ModelError(f"{file.name} of {manifest.name} arrived damaged")
            (Path(scratch) / file.name).write_bytes(raw)
        return _install(manifest, Path(scratch), models_dir)


def _describe(
    files: ModelFiles,
    weights: Weights,
    facts: ModelFacts,
    dtype: str,
    packed: PackedSizes | None,
    digests: tuple[FileDigest, ...],
    bundle_dir: Path,
) -> Manifest:
    layers = [sum(place.num_parameters for place in places) for places in _layers(weights)]
    layers += [0] * (facts.num_layers - len(layers))
    if len(layers) > facts.num_layers:
        raise ModelError(f"{files.source} has {len(layers)} layers, its config says {facts.num_layers}")
    if 0 in layers:
        raise ModelError(f"{files.source}: the weights lack layer {layers.index(0)}")
    embedding = weights.place(EMBEDDING)
    head = weights.tensors.get(HEAD, embedding)
    return Manifest(
        name=files.name,
        model_type=facts.model_type,
        hidden_size=facts.hidden_size,
        vocab_size=facts.vocab_size,
        max_context_tokens=facts.max_context_tokens,
        dtype=dtype,
        weights=digests,
        bundle=tuple(_digest(path) for path in sorted(bundle_dir.iterdir())),
        layer_num_parameters=tuple(layers),
        embedding_num_parameters=embedding.num_parameters,
        head_num_parameters=head.num_parameters + weights.place(FINAL_NORM).num_parameters,
        num_kv_values_per_token_per_layer=facts.num_kv_values_per_token_per_layer,
        eos_token_ids=facts.eos_token_ids,
        packed=packed,
    )


def _packed_sizes(weights: Weights, dtype: str) -> PackedSizes | None:
    """None for a model of floats. What is not packed is planned as float32, as CPUs keep it."""
    bits = max_num_bits(dtype, weights.tensors.values())
    if bits is None:
        return None
    embedding = weights.place(EMBEDDING)
    head = weights.tensors.get(HEAD, embedding)
    return PackedSizes(
        weight_type=weight_type(bits, weights.tensors.values()),
        layer_num_bytes=tuple(sum(num_bytes_of(place, bits, 4) for place in ps) for ps in _layers(weights)),
        embedding_num_bytes=num_bytes_of(embedding, bits, 4),
        head_num_bytes=num_bytes_of(head, bits, 4) + num_bytes_of(weights.place(FINAL_NORM), bits, 4),
    )


def _layers(weights: Weights) -> list[list[TensorPlace]]:
    """The tensors of every decoder layer up to the last one that has any."""
    layers: dict[int, list[TensorPlace]] = {}
    for name, place in weights.tensors.items():
        layer = layer_of(name)
        if layer is not None:
            layers.setdefault(layer, []).append(place)
    return [layers.get(layer, []) for layer in range(min(max(layers, default=-1) + 1, MAX_NUM_LAYERS))]


def _install(manifest: Manifest, bundle_dir: Path, models_dir: Path) -> Path:
    """Rename a complete copy into place, so that a package is there whole or not at all."""
    if any(file.size_bytes > MAX_BUNDLE_FILE_BYTES for file in manifest.bundle):
        raise ModelError(
            f"a config or tokenizer file of {manifest.name} is larger than {MAX_BUNDLE_FILE_BYTES}"
        )
    target = package_dir(manifest.model_id, models_dir)
    if (target / MANIFEST_FILE).is_file():
        return target
    with tempfile.TemporaryDirectory(dir=models_dir, prefix="new-") as scratch:
        ready = Path(scratch) / "package"
        shutil.copytree(bundle_dir, ready)
        (ready / MANIFEST_FILE).write_bytes(manifest.encode())
        try:
            ready.rename(target)
        except OSError:
            # Another process installed the same package between the check and the rename.
            if not (target / MANIFEST_FILE).is_file():
                raise
    return target


def _digests(paths: tuple[Path, ...], models_dir: Path, progress: Progress | None) -> tuple[FileDigest, ...]:
    known = _read_known(models_dir)
    digests = []
    for path in paths:
        status = path.stat()
        key = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        if key in known:
            digests.append(FileDigest(path.name, status.st_size, bytes.fromhex(known[key])))
            continue
        digests.append(_digest(path, progress))
        known[key] = digests[-1].sha256.hex()
    _write_known(models_dir, known)
    return tuple(digests)


def _digest(path: Path, progress: Progress | None = None) -> FileDigest:
    total_bytes, done_bytes, state = path.stat().st_size, 0, hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            state.update(piece)
            done_bytes += len(piece)
            if progress is not None:
                progress(path.name, done_bytes, total_bytes)
    return FileDigest(path.name, total_bytes, state.digest())


def _read_known(models_dir: Path) -> dict[str, str]:
    """A lost or damaged memory of digests only costs time."""
    try:
        known = json.loads((models_dir / DIGESTS_FILE).read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: value for key, value in known.items() if isinstance(value, str) and len(value) == 64}


def _write_known(models_dir: Path, known: Mapping[str, str]) -> None:
    models_dir.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=models_dir, prefix="new-")
    with os.fdopen(handle, "w") as file:
        json.dump(known, file)
    Path(scratch).replace(models_dir / DIGESTS_FILE)
