"""Compiled layers in the background: made in a child process, kept on disk, swapped in when right and fast.

Serving is eager from the first second. A layer kind is compiled once, for one row and for several, and used
for all its layers; compiled code that is not what eager computes, or no faster, is left alone. Whatever fails
here costs speed and one line in the log.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from node.engine.attention import PagedStep, Span
from node.engine.compiled_layer import Code, CompiledLayer, can_compile, kind_of, layer_weights
from node.engine.kv_cache import KvCache
from node.engine.shard import Shard

log = logging.getLogger(__name__)

COMPILE_TIMEOUT_S = 900.0
MAX_NUM_FILES = 32
MAX_RELATIVE_ERROR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
MIN_GAIN = 1.03
CHECKED_ROWS = {1: 1, 0: 16}
SUFFIX = ".pt2"
_NUM_PROBES = 7
_CHILD_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


class CompileError(Exception):
    """One line: why a layer stays eager."""


class LayerCompiler:
    """`submit()` returns at once and may be called from any thread; one layer is compiled at a time."""

    def __init__(self, directory: Path, num_threads: int) -> None:
        self._directory = directory
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-compile")
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def submit(self, shard: Shard, model_dir: Path) -> None:
        self._pool.submit(self._compile_or_log, shard, model_dir)

    def finish(self) -> None:
        """Wait for all that was submitted."""
        self._pool.submit(int).result()

    def close(self) -> None:
        """Ends the child; what is compiled already stays."""
        with self._lock:
            self._is_closed = True
            if self._child is not None:
                self._child.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _compile_or_log(self, shard: Shard, model_dir: Path) -> None:
        try:
            self._compile(shard, model_dir)
        except CompileError as error:
            if not self._is_closed:
                log.warning("layers run uncompiled: %s", error)
        except Exception as error:
            log.warning("layers run uncompiled: %s: %s", type(error).__name__, error)

    def _compile(self, shard: Shard, model_dir: Path) -> None:
        torch.set_num_threads(self._num_threads)
        # A process that was killed has left its scratch.
        scratch = self._directory / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch.mkdir(mode=0o700)
        try:
            # One row first: that is one user's decode.
            for rows in CHECKED_ROWS:
                for kind, layers in kinds_of(shard).items():
                    path = self._directory / f"{kind}-{rows}{SUFFIX}"
                    if not path.exists():
                        unfinished = scratch / path.name
                        self._run_child(_job(shard, model_dir, layers[0], rows, unfinished), scratch)
                        unfinished.replace(path)
                    path.touch()
                    _drop_oldest(self._directory)
                    _swap_in(shard, layers, rows, path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _run_child(self, job: dict[str, str | int], scratch: Path) -> None:
        """Raises CompileError."""
        log_path = scratch / "log"
        with log_path.open("wb") as log_file, self._lock:
            if self._is_closed:
                raise CompileError("the engine stops")
            self._child = child = subprocess.Popen(
                [sys.executable, "-m", "node.engine.compile_layer"],
                stdin=subprocess.PIPE,
                stdout=log_file,
                stderr=log_file,
                env={**os.environ, **_CHILD_ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": str(scratch)},
            )
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(job).encode() + b"\n")
            child.stdin.flush()
            code = child.wait(COMPILE_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CompileError(str(error)) from error
        finally:
            child.kill()
            child.wait()
            with contextlib.suppress(OSError):
                child.stdin.close()
        if code != 0:
            said = log_path.read_text(errors="replace").strip().splitlines()
            raise CompileError(said[-1][:300] if said else f"the compiling process ended with code {code}")


def kinds_of(shard: Shard) -> dict[str, list[int]]:
    """The layers of each kind that can be compiled."""
    kinds: dict[str, list[int]] = {}
    config_json = shard.config.to_json_string()
    for index, layer in enumerate(shard.layers, shard.start_layer):
        if can_compile(layer, shard.dtype):
            kind = kind_of(layer, config_json, shard.dtype, shard.device)
            kinds.setdefault(kind, []).append(index)
    return kinds


def _job(shard: Shard, model_dir: Path, layer: int, rows: int, path: Path) -> dict[str, str | int]:
    return {
        "model_dir": str(model_dir.absolute()),
        "layer": layer,
        "dtype": str(shard.dtype).removeprefix("torch."),
        "device": str(shard.device),
        "rows": rows,
        "path": str(path.absolute()),
    }


def _drop_oldest(directory: Path) -> None:
    """What was not used for longest, above the limit."""
    files = sorted(directory.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime)
    for path in files[:-MAX_NUM_FILES]:
        path.unlink(missing_ok=True)


def _swap_in(shard: Shard, layers: list[int], rows: int, path: Path) -> None:
    """Raises CompileError for code that computes something else."""
    try:
        code = load_code(path, shard.device)
        compiled = [make_compiled(shard, layer, code) for layer in layers]
        gain = checked_gain(shard, compiled[0], CHECKED_ROWS[rows])
    except Exception:
        # Never again the same file.
        path.unlink(missing_ok=True)
        raise
    log.info("a compiled layer is %.2f times as fast, %s", gain, "one row" if rows == 1 else "several rows")
    if gain >= MIN_GAIN:
        for layer in compiled:
            shard.set_compiled(rows == 1, layer)


def load_code(path: Path, device: torch.device) -> Code:
    """Raises RuntimeError when it is not what this torch can load."""
    loaded = torch._inductor.aoti_load_package(str(path), device_index=device.index or -1)
    run: Code = loaded.loader.boxed_run
    return run


def make_compiled(shard: Shard, layer: int, code: Code) -> CompiledLayer:
    weights = layer_weights(shard.layers[layer - shard.start_layer])
    return CompiledLayer(layer, tuple(weights.values()), code)


@torch.inference_mode()
def checked_gain(shard: Shard, compiled: CompiledLayer, num_rows: int) -> float:
    """How many times as fast as eager it is. Raises CompileError when its rows are others."""
    config, device = shard.config, shard.device
    cache = KvCache(
        compiled.layer, compiled.layer + 1, 1, config.num_key_value_heads, shard.head_dim, shard.dtype, device
    )
    table = cache.open(num_rows)
    generator = torch.Generator().manual_seed(num_rows)
    hidden = torch.randn(1, num_rows, config.hidden_size, generator=generator).to(device, shard.dtype)
    positions = torch.arange(num_rows, device=device)[None]
    rope = shard.rope(compiled.layer, hidden, positions)
    step = PagedStep(cache, [Span(table, 0, num_rows)])
    eager = partial(shard.run_eagerly, compiled.layer, hidden, positions, rope, step)
    faster = partial(compiled, hidden, rope, step)
    expected, actual = eager().float(), faster().float()
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    # Written so that NaN fails too.
    if not error <= MAX_RELATIVE_ERROR[shard.dtype]:
        raise CompileError(f"compiled code computes something else (relative error {error:.1e})")
    times = [(_seconds(eager), _seconds(faster)) for _ in range(_NUM_PROBES)]
    return min(time[0] for time in times) / min(time[1] for time in times)


def _seconds(run: Callable[[], Tensor]) -> float:
    started_s = time.perf_counter()
    # Asking for a number waits for the device.
    run().sum().item()
    return time.perf_counter() - started_s
