"""Config and tokenizer of a model as plain files, made by transformers' own helpers, and the facts they tell.

Runs as a process of its own (`python -m node.models.bundle SOURCE DIRECTORY`): these helpers import torch and
take seconds, and the node process has neither to spare. Prints one JSON line: facts, or `{"error": ...}`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from node.models.errors import ModelError
from node.models.gguf_file import GgufFile
from node.models.tensors import EMBEDDING, HEAD

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
# The other kinds change with what else is in the batch, or with the length of the sequence.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
GGUF_MODEL_TYPES = {"gemma3": "gemma3_text"}
TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class ModelFacts:
    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_context_tokens: int
    num_kv_values_per_token_per_layer: int
    eos_token_ids: tuple[int, ...]


def make_bundle_apart(source: Path, directory: Path) -> ModelFacts:
    """`make_bundle_here` in a process of its own. Raises ModelError."""
    command = [sys.executable, "-m", "node.models.bundle", str(source), str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)  # noqa: S603
        answer = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        raise ModelError(
            f"cannot read the config and tokenizer of {source} ({type(error).__name__})"
        ) from error
    if "error" in answer:
        raise ModelError(answer["error"])
    return ModelFacts(**answer | {"eos_token_ids": tuple(answer["eos_token_ids"])})


def make_bundle_here(source: Path, directory: Path) -> ModelFacts:
    """Fills `directory` with config.json and, where there is one, the tokenizer. Imports torch."""
    from transformers import AutoConfig

    is_gguf = source.suffix == ".gguf"
    parent = source.parent if is_gguf else source
    if is_gguf:
        config = _gguf_config(source)
    else:
        config = AutoConfig.from_pretrained(parent, trust_remote_code=False, local_files_only=True)
    check_config(config, source)
    config.to_json_file(directory / "config.json", use_diff=False)
    if is_gguf:
        _save_gguf_tokenizer(source, directory)
    else:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelFacts(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_context_tokens=config.max_position_embeddings,
        num_kv_values_per_token_per_layer=2 * config.num_key_value_heads * head_dim,
        eos_token_ids=_eos_token_ids(parent, config.eos_token_id),
    )


def check_config(config: PreTrainedConfig, source: Path) -> None:
    """Raises ModelError for what stages would not compute as transformers does."""
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise ModelError(
            f"{source}: architecture {config.model_type!r} is not supported "
            f"(supported: {', '.join(SUPPORTED_MODEL_TYPES)})"
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ModelError(
            f"{source}: quantization {str(method)!r} of its config is not supported "
            "(supported: GGUF files, or float weights with --quantize int4 or int8)"
        )
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ModelError(
            f"{source}: {num_heads} attention heads cannot share {num_kv_heads} heads of keys and values"
        )
    parameters = getattr(config, "rope_parameters", None) or {}
    # One set for the model, or one per layer type.
    per_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    for one in per_layer_type or [parameters]:
        rope_type = one.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ModelError(
                f"{source}: rope type {rope_type!r} is not supported (supported: {', '.join(ROPE_TYPES)})"
            )


def _gguf_config(source: Path) -> PreTrainedConfig:
    """transformers' own table of GGUF keys, without its reader, which takes seconds for the vocabulary."""
    from transformers import CONFIG_MAPPING
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    file = GgufFile(source)
    try:
        architecture, names = file.architecture, GGUF_CONFIG_MAPPING[file.architecture]
        values = {
            name: file.metadata[f"{architecture}.{key}"]
            for key, name in names.items()
            if name is not None and f"{architecture}.{key}" in file.metadata
        }
        values["tie_word_embeddings"] = HEAD not in file.tensors
        values.setdefault("vocab_size", file.tensors[EMBEDDING].shape[0])
        for name in ("bos_token_id", "eos_token_id"):
            values[name] = file.metadata.get(f"tokenizer.ggml.{name}")
    finally:
        file.close()
    return CONFIG_MAPPING[GGUF_MODEL_TYPES.get(architecture, architecture)](**values)


def _save_gguf_tokenizer(source: Path, directory: Path) -> None:
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, vocabulary, config = get_gguf_tokenizer(str(source))
    backend, more = convert_gguf_tokenizer(architecture, vocabulary)
    PreTrainedTokenizerFast(tokenizer_object=backend, **config | more).save_pretrained(directory)


def _eos_token_ids(directory: Path, of_config: int | list[int] | None) -> tuple[int, ...]:
    """The generation config has the last word: chat models end a turn with more than the config's token."""
    path = directory / "generation_config.json"
    value = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    if value is None:
        value = of_config
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(sorted({token_id for token_id in ids if isinstance(token_id, int)}))


def main(source: str, directory: str) -> int:
    try:
        facts = make_bundle_here(Path(source), Path(directory))
    except ModelError as error:
        print(json.dumps({"error": str(error)}))
    except Exception as error:
        # transformers raises whatever its parsers raise; the caller needs one line, whichever it was.
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        print(json.dumps({"error": f"cannot read the config and tokenizer of {source}: {reason}"}))
    else:
        print(json.dumps(asdict(facts)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
