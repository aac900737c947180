"""`python -m node.engine.compile_layer < job`: compiles one layer of a model ahead of time, into a file.

A process of its own at low priority, so that serving neither waits nor holds what compiling needs. It
ends with its parent. It loads no weights: compiled code takes them as arguments.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig

from node.engine.compiled_layer import layer_weights
from node.engine.shard import Shard

EXAMPLE_ROWS = 8
# Low, but not the lowest: beside a node that never rests, 19 made no progress in ten minutes.
NICENESS = 10
MAX_NUM_ROWS = 1 << 20


class _Layer(nn.Module):
    def __init__(self, layer: nn.Module, names: list[str]) -> None:
        super().__init__()
        # Hidden in a tuple: the weights are arguments and not the module's own.
        self._layer = (layer,)
        self._names = names

    def forward(self, weights: tuple[Tensor, ...], hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        named = dict(zip(self._names, weights, strict=True))
        keywords = {
            "attention_mask": None,
            "position_ids": None,
            "position_embeddings": (cos, sin),
            "paged": None,
        }
        return torch.as_tensor(functional_call(self._layer[0], named, (hidden,), keywords))


def compile_layer(shard: Shard, rows: int, path: Path) -> None:
    """The first layer of the shard, its weights anything; `rows` 1 for one row, 0 for any larger number."""
    layer = shard.layers[0]
    weights = layer_weights(layer)
    num_rows = rows or EXAMPLE_ROWS
    hidden = torch.zeros(1, num_rows, shard.config.hidden_size, dtype=shard.dtype, device=shard.device)
    cos, sin = shard.rope(shard.start_layer, hidden, torch.arange(num_rows, device=shard.device)[None])
    shapes = None
    if rows == 0:
        dynamic = {1: torch.export.Dim("rows", min=2, max=MAX_NUM_ROWS)}
        shapes = ((None,) * len(weights), dynamic, dynamic, dynamic)
    with torch.no_grad():
        program = torch.export.export(
            _Layer(layer, list(weights)),
            (tuple(weights.values()), hidden, cos, sin),
            dynamic_shapes=shapes,
            strict=False,
        )
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def build_layer(model_dir: Path, layer: int, dtype: torch.dtype, device: torch.device) -> Shard:
    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
    shard = Shard(config, layer, layer + 1, dtype, device)
    prefix = f"model.layers.{layer}."
    for name, shape in shard.parameter_shapes():
        if name.startswith(prefix):
            shard.set_parameter(name, torch.zeros(shape, dtype=dtype, device=device))
    return shard


def _die_with_parent() -> None:
    """Its end of our standard input closes when it ends, however that happens."""
    sys.stdin.read()
    os._exit(1)


def main() -> int:
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    dtype = getattr(torch, job["dtype"])
    shard = build_layer(Path(job["model_dir"]), job["layer"], dtype, torch.device(job["device"]))
    compile_layer(shard, job["rows"], Path(job["path"]))
    return 0


if __name__ == "__main__":
    code = 0
    try:
        code = main()
    except Exception as error:
        # The parent logs the last line.
        print(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        code = 1
    sys.stderr.flush()
    os._exit(code)
