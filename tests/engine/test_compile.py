"""Compiled layers: what eager computes, once per kind, from disk the next time; without a compiler, eager."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from node.engine import compile as compiling
from node.engine.attention_op import running
from node.engine.compile import LayerCompiler
from node.engine.shard import Shard
from tests.engine.load_shard import load_shard
from tests.engine.ring import GREEDY, Ring
from tests.engine.tiny import NUM_LAYERS, TinyModel

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7, 8], [9] * 20, [11, 12]]
ALL = set(range(NUM_LAYERS))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rows only; taken whatever it gains; the compiler's vector units are not probed."""
    monkeypatch.setattr(compiling, "CHECKED_ROWS", {0: 16})
    monkeypatch.setattr(compiling, "MIN_GAIN", 0.0)
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")


def shard_of(model: TinyModel, dtype: torch.dtype = torch.float32) -> Shard:
    package = model.package
    shard, _ = load_shard(
        package.manifest, package.directory, package.weights, 0, NUM_LAYERS, dtype, CPU, lambda *_: None
    )
    return shard


def compiled_by(compiler: LayerCompiler, shard: Shard, model: TinyModel) -> set[int]:
    """The layers that run compiled afterwards."""
    compiler.submit(shard, model.package.directory)
    compiler.finish()
    return shard.compiled_layers(is_one_row=False)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_compiled_is_eager_and_comes_from_disk_the_second_time(
    llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = [llama.generate(prompt, 16) for prompt in PROMPTS]
    with Ring(llama.package, (2,)) as ring:
        compiler = LayerCompiler(tmp_path, 1)
        for loaded in ring.shards:
            assert isinstance(loaded.shard, Shard)
            compiled_by(compiler, loaded.shard, llama)
        assert [loaded.shard.compiled_layers(False) for loaded in ring.shards] == [{0, 1}, {2, 3}]
        assert ring.generate(PROMPTS, GREEDY) == expected
    # One kind, so one file for all layers of both stages; what checks it is `checked_gain`.
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(compiling.LayerCompiler, "_run_child", None)
    assert compiled_by(LayerCompiler(tmp_path, 1), shard_of(llama), llama) == ALL
    assert not warnings_of(caplog)


def test_without_a_compiler_layers_stay_eager_with_one_line(
    llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", os.fspath(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    assert compiled_by(LayerCompiler(tmp_path / "compiled", 1), shard_of(llama), llama) == set()
    (line,) = warnings_of(caplog)
    assert line.startswith("layers run uncompiled: ")
    assert "\n" not in line
    assert list((tmp_path / "compiled").iterdir()) == []


Alter = Callable[[Tensor], Tensor]


@pytest.mark.parametrize(
    ("alter", "is_taken"),
    [(lambda rows: rows, True), (lambda rows: rows * 1.001, False), (lambda rows: rows * torch.nan, False)],
    ids=["right", "a little wrong", "NaN"],
)
def test_only_code_that_is_right_is_taken(
    llama: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    alter: Alter,
    is_taken: bool,
) -> None:
    shard = shard_of(llama)
    use_code(monkeypatch, shard, alter)
    compiler = LayerCompiler(tmp_path, 1)
    assert compiled_by(compiler, shard, llama) == (ALL if is_taken else set())
    assert len(warnings_of(caplog)) == (0 if is_taken else 1)
    # What was wrong is not found again.
    assert len(list(tmp_path.iterdir())) == int(is_taken)


def test_code_that_is_no_faster_is_left_alone(
    llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shard_of(llama)
    use_code(monkeypatch, shard, lambda rows: rows)
    monkeypatch.setattr(compiling, "MIN_GAIN", 1e9)
    assert compiled_by(LayerCompiler(tmp_path, 1), shard, llama) == set()


def use_code(monkeypatch: pytest.MonkeyPatch, shard: Shard, alter: Alter) -> None:
    """Instead of compiling: eager itself behind the interface of compiled code, its rows altered."""

    def run(arguments: list[Tensor]) -> list[Tensor]:
        hidden, cos, sin = arguments[-3:]
        step, layer = running.step, running.layer
        assert step is not None
        positions = torch.arange(hidden.shape[1])[None]
        return [alter(shard.run_eagerly(layer, hidden, positions, (cos, sin), step))]

    def child(self: LayerCompiler, job: dict[str, str | int], scratch: Path) -> None:
        Path(str(job["path"])).touch()

    monkeypatch.setattr(compiling, "load_code", lambda path, device: run)
    monkeypatch.setattr(LayerCompiler, "_run_child", child)


def test_layers_that_differ_are_of_different_kinds(tiny: Callable[[str], TinyModel]) -> None:
    def kinds(family: str, dtype: torch.dtype = torch.float32) -> dict[str, list[int]]:
        return compiling.kinds_of(shard_of(tiny(family), dtype))

    assert list(kinds("llama").values()) == [[0, 1, 2, 3]]
    # Every second layer has a window.
    assert list(kinds("gemma3").values()) == [[0, 2], [1, 3]]
    assert not kinds("llama").keys() & kinds("llama", torch.bfloat16).keys()
    assert not kinds("llama").keys() & kinds("mistral").keys()


def test_the_directory_is_bounded(llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        path = tmp_path / f"{number}.pt2"
        path.touch()
        os.utime(path, (number, number))
    shard = shard_of(llama)
    use_code(monkeypatch, shard, lambda rows: rows)
    assert compiled_by(LayerCompiler(tmp_path, 1), shard, llama) == ALL
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == compiling.MAX_NUM_FILES
    assert "39.pt2" in left
    assert "0.pt2" not in left
