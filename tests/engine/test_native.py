"""The C++ kernels against transformers on the same (dequantized) weights, and against themselves.

The same bits must come in any batch, chunking, number of threads and split.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from node.engine.attention import PagedStep, Span
from node.engine.kv_cache import KvCache
from node.engine.native import build
from node.engine.native.abi import Kernels
from node.engine.native.architecture import FAMILIES, why_not
from node.engine.native.build import NoKernels, load_kernels
from node.engine.native.native_shard import NativeShard
from node.engine.packed import PackedWeight, from_float

NUM_LAYERS = 4
PROMPT_TOKENS = 300
WINDOW = 24
# The largest difference of a logit as a share of the largest. What there is comes from the half-float cache.
TOLERANCE = 1e-3
TOLERANCE_GEMMA = 1e-2
# Of all logits together: packed weights are rounded to bfloat16 for the rows of prompts.
TOLERANCE_PROMPT = 3e-2

_SIZES = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
_GEMMA = {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}
_TYPES = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_config(family: str) -> PreTrainedConfig:
    match family:
        case "llama":
            return LlamaConfig(**_SIZES, rope_parameters=_LLAMA3_ROPE)
        case "mistral":
            return MistralConfig(**_SIZES, sliding_window=WINDOW)
        case "qwen2":
            return Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2)
        case "qwen3":
            return Qwen3Config(**_SIZES, head_dim=32, tie_word_embeddings=True)
        case "gemma2":
            return Gemma2Config(**_SIZES, **_GEMMA)
        case _:
            return Gemma3TextConfig(**_SIZES, **_GEMMA, layer_types=_TYPES)


def make_reference(family: str) -> PreTrainedModel:
    return make_model(make_config(family))


def make_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.08)
        else:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model


def as_stored(value: Tensor, bits: int) -> Tensor | PackedWeight:
    if value.dim() == 2 and bits < 16:
        return from_float(value, bits)
    return value


def as_computed(value: Tensor, bits: int) -> Tensor:
    """What the reference is to compute with."""
    stored = as_stored(value, bits)
    if isinstance(stored, PackedWeight):
        return stored.dequantize(torch.float32)
    return value.to(torch.bfloat16).float() if bits == 16 and value.dim() == 2 else value


class Native:
    """Layers of a reference in the kernels, with a cache."""

    def __init__(
        self,
        kernels: Kernels,
        reference: PreTrainedModel,
        bits: int,
        start: int = 0,
        end: int = NUM_LAYERS,
        num_threads: int = 2,
    ) -> None:
        config = copy.deepcopy(reference.config)
        weight_dtype = torch.bfloat16 if bits == 16 else torch.float32
        self.shard = NativeShard(kernels, config, start, end, weight_dtype, num_threads)
        stored: dict[int, Tensor | PackedWeight] = {}
        state = reference.state_dict(keep_vars=True)
        for name, _ in self.shard.parameter_shapes():
            value = state[name]
            known = stored.setdefault(id(value), as_stored(value.detach(), bits))
            if isinstance(known, PackedWeight):
                self.shard.set_packed(name, known)
            else:
                self.shard.set_parameter(name, known)
        self.shard.release_others()
        num_kv_heads = config.num_key_value_heads
        head_dim = self.shard.head_dim
        self.cache = KvCache(start, end, 120, num_kv_heads, head_dim, torch.float16, torch.device("cpu"))

    def rows(self, hidden: Tensor, spans: list[Span]) -> Tensor:
        positions = torch.empty(0)
        step = PagedStep(self.cache, spans)
        return self.shard.run(hidden, positions, step, self.shard.start_layer, self.shard.end_layer)

    def logits_of(self, ids: list[int], chunks: Sequence[int], num_prompt_tokens: int = 0) -> Tensor:
        """Of all rows; the first `num_prompt_tokens` go through the layers as a prompt's do."""
        table, done, logits = self.cache.open(len(ids)), 0, []
        for num_tokens in chunks:
            hidden = self.shard.embed(torch.tensor(ids[done : done + num_tokens]))
            num_prompt_rows = min(max(0, num_prompt_tokens - done), num_tokens)
            span = Span(table, done, num_tokens, num_prompt_rows)
            logits.append(self.shard.logits(self.rows(hidden, [span])))
            done += num_tokens
        self.cache.close(table)
        return torch.cat(logits)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return load_kernels()


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_reference(request.param)


def prompt(num_tokens: int = PROMPT_TOKENS, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 199, (num_tokens,), generator=generator).tolist()


@torch.inference_mode()
@pytest.mark.parametrize("is_prompt", [False, True], ids=["output", "prompt"])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_logits_are_those_of_transformers(
    kernels: Kernels, reference: PreTrainedModel, bits: int, is_prompt: bool
) -> None:
    assert why_not(reference.config) is None
    ids = prompt()
    twin = copy.deepcopy(reference)
    for name, value in twin.state_dict().items():
        value.copy_(as_computed(reference.state_dict()[name], bits))
    expected = twin(torch.tensor([ids])).logits[0]
    logits = Native(kernels, reference, bits).logits_of(ids, [len(ids)], len(ids) if is_prompt else 0)
    tolerance = TOLERANCE_GEMMA if "gemma" in reference.config.model_type else TOLERANCE
    if is_prompt and bits in (4, 8):
        assert (logits - expected).norm() <= TOLERANCE_PROMPT * expected.norm()
        return
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


@torch.inference_mode()
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_same_bits_in_any_chunks_and_with_any_threads(
    kernels: Kernels, reference: PreTrainedModel, bits: int
) -> None:
    ids = prompt()
    chunks = [*[1] * 20, 7, 130, *[1] * 143]
    for num_prompt_tokens in (0, 100, len(ids)):
        whole = Native(kernels, reference, bits).logits_of(ids, [len(ids)], num_prompt_tokens)
        for num_threads in (1, 2, 3):
            native = Native(kernels, reference, bits, num_threads=num_threads)
            assert torch.equal(native.logits_of(ids, chunks, num_prompt_tokens), whole)


@torch.inference_mode()
def test_the_same_bits_in_any_batch_and_any_split(kernels: Kernels, reference: PreTrainedModel) -> None:
    """Prompts and output of several sessions in one step, over two shards that cut the layers."""
    first, last = Native(kernels, reference, 4, end=1), Native(kernels, reference, 4, start=1)
    prompts = [prompt(n, seed=n) for n in (1, 17, 40, 290)]
    num_prompt = (1, 0, 39, 100)
    alone = [
        Native(kernels, reference, 4).logits_of(ids, [len(ids)], num)[-1]
        for ids, num in zip(prompts, num_prompt, strict=True)
    ]
    tables = [(first.cache.open(len(ids)), last.cache.open(len(ids))) for ids in prompts]
    for start, end in ((0, -1), (-1, None)):
        parts = [ids[start:end] for ids in prompts]
        begins = [len(ids) + start if start else 0 for ids in prompts]
        running = [i for i, part in enumerate(parts) if part]
        hidden = first.shard.embed(torch.tensor([token for part in parts for token in part]))
        for side, native in enumerate((first, last)):
            spans = [
                Span(
                    tables[i][side],
                    begins[i],
                    len(parts[i]),
                    min(max(0, num_prompt[i] - begins[i]), len(parts[i])),
                )
                for i in running
            ]
            hidden = native.rows(hidden, spans)
    assert torch.equal(last.shard.logits(hidden), torch.stack(alone))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "window"),
    [(6, 3, 64, 24), (4, 1, 96, 260), (6, 3, 48, 1024), (2, 2, 128, 280), (7, 1, 32, 1024)],
)
def test_prompts_with_heads_of_many_sizes(
    kernels: Kernels, num_heads: int, num_kv_heads: int, head_dim: int, window: int
) -> None:
    """Also where a step has rows of prompts and of output, attended to in parts by all threads."""
    heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "head_dim": head_dim}
    model = make_model(MistralConfig(**_SIZES | heads, sliding_window=window))
    twin = copy.deepcopy(model)
    for name, value in twin.state_dict().items():
        value.copy_(as_computed(model.state_dict()[name], 16))
    ids = prompt()
    expected = twin(torch.tensor([ids])).logits[0]
    num_prompt_tokens = len(ids) - 10
    chunks = [200, 85, 8, *[1] * 7]
    found = [
        Native(kernels, model, 16, num_threads=num_threads).logits_of(ids, parts, num_prompt_tokens)
        for num_threads, parts in ((1, [len(ids)]), (2, chunks), (3, [31, *chunks[1:], 169]))
    ]
    assert (found[0] - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


@torch.inference_mode()
def test_a_row_that_is_not_a_number_stays_alone(kernels: Kernels) -> None:
    native = Native(kernels, make_reference("llama"), 4)
    good, bad = native.cache.open(1), native.cache.open(1)
    hidden = native.shard.embed(torch.tensor([5, 5]))
    alone = native.rows(hidden[:1].clone(), [Span(good, 0, 1)])
    hidden[1, 3] = float("nan")
    rows = native.rows(hidden, [Span(good, 0, 1), Span(bad, 0, 1)])
    assert torch.equal(rows[:1], alone)
    assert native.shard.logits(rows[1:]).isnan().all()


AVX2 = ("-mno-avx512f", "-mavx2", "-mfma", "-mf16c")


@torch.inference_mode()
@pytest.mark.skipif(build.MACHINE not in ("x86_64", "AMD64"), reason="the flags are of x86")
@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [(AVX2, 0.0), ((*AVX2, "-mno-avxvnni"), 0.0), (("-mno-avx", "-msse2"), TOLERANCE)],
    ids=["avx2 with vnni", "avx2", "sse2"],
)
def test_older_instructions_give_the_same(
    kernels: Kernels,
    flags: tuple[str, ...],
    tolerance: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit with AVX2, whose fused multiply and add rounds alike; without that, nearly."""
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, *flags))
    reference, ids = make_reference("llama"), prompt(60)
    ours = Native(kernels, reference, 4).logits_of(ids, [60])
    theirs = Native(load_kernels(tmp_path), reference, 4).logits_of(ids, [60])
    assert (ours - theirs).abs().max() <= tolerance * ours.abs().max()


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoKernels, match="compiler"):
        load_kernels(tmp_path)
    assert build.kernels_or_none() is None


def test_a_damaged_library_is_made_again(kernels: Kernels, tmp_path: Path) -> None:
    for library in build.cache_dir().glob("*.so"):
        (tmp_path / library.name).write_bytes(b"not a library")
    load_kernels(tmp_path)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    (tmp_path / "kernels.cpp").write_text("this is not C++")
    with pytest.raises(NoKernels, match="the compiler failed"):
        load_kernels(tmp_path / "cache")


def test_what_the_kernels_cannot_run_is_named() -> None:
    assert "dimensions" in (why_not(LlamaConfig(**_SIZES | {"head_dim": 24, "hidden_size": 96})) or "")
    assert "activation" in (why_not(LlamaConfig(**_SIZES, hidden_act="relu")) or "")
    assert "multiples" in (why_not(LlamaConfig(**_SIZES | {"intermediate_size": 100})) or "")
    assert "evenly" in (why_not(LlamaConfig(**_SIZES | {"num_key_value_heads": 3})) or "")
    partly = {"rope_type": "linear", "factor": 1.0, "partial_rotary_factor": 8}
    assert "part of each head" in (why_not(LlamaConfig(**_SIZES, rope_parameters=partly)) or "")
    assert "rotary" in (
        why_not(LlamaConfig(**_SIZES, rope_parameters=_LLAMA3_ROPE | {"rope_type": "dynamic"})) or ""
    )
