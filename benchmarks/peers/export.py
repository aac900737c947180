"""The built-in model's weights, dequantized to float32, as a directory of safetensors for peers.

`python -m benchmarks.peers.export DIRECTORY` writes it (540 MB) unless it is there. No tokenizer: the
benchmarks speak in token ids.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from node.models.reference import resolve


def export(ref: str, directory: Path) -> None:
    if (directory / "config.json").is_file():
        return
    path = resolve(ref).weights[0]
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    # Under another name first: a directory with a config.json is complete.
    unfinished = directory.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    unfinished.rename(directory)


if __name__ == "__main__":
    export("smollm2-135m", Path(sys.argv[1]))
