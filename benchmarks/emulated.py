"""Three stages with slow links between them: a relay in front of each node's stage links delays every hop.

One stream. The allowance for a token is three times the one-way delay, the time the same split takes without
delay (measured in turns with it), and one millisecond. Only stage links are delayed, not the control plane.
"""

from __future__ import annotations

from benchmarks import pods
from benchmarks.bench import Bench, System
from benchmarks.report import Goal, Line

SECTION = "emulated"
NUM_STAGES = 3
PROMPT_TOKENS = 32
DELAYS_MS = (1, 10, 50)
MARGIN_MS = 1.0
HOT = 1.5
NO_DELAY = "the same without delay"


def run(bench: Bench) -> None:
    with pods.pod(NUM_STAGES, 1) as direct:
        for delay_ms in DELAYS_MS:
            bench.say(f"starting a pod of three nodes, {delay_ms} ms apart")
            with pods.pod(NUM_STAGES, 1, delay_s=delay_ms / 1e3) as slow:
                _allowance(bench, {"ours": slow, NO_DELAY: direct}, delay_ms)
                if delay_ms == 10:
                    _speculation(bench, slow)


def _allowance(bench: Bench, systems: dict[str, System | str], delay_ms: float) -> None:
    num_tokens = (60 if bench.quick else 150) // (3 if delay_ms > 20 else 1)

    def token_ms(system: System) -> float:
        return 1e3 / system.decode([bench.prompts.one(PROMPT_TOKENS)], num_tokens)["tokens_per_s"]

    series = bench.turns(systems, token_ms, 1 if bench.quick else 3)
    if failure := series["ours"].failure or series[NO_DELAY].failure:
        bench.failed(f"{delay_ms} ms: {failure}")
        return
    allowed = tuple(NUM_STAGES * delay_ms + value + MARGIN_MS for value in series[NO_DELAY].values)
    what = f"time per token, 3 stages {delay_ms} ms apart one way"
    ours = tuple(series["ours"].values)
    peer = f"3 x {delay_ms} ms + without delay + {MARGIN_MS:.0f} ms"
    bench.add(Line(SECTION, what, "ms", ours, peer, allowed, Goal(1.0, at_least=False)))


def _speculation(bench: Bench, off: pods.Pod) -> None:
    """The same with guesses, for text that repeats and for text that does not."""
    num_tokens = 60 if bench.quick else 150
    with pods.pod(NUM_STAGES, 1, delay_s=0.010, speculation=True) as on:
        systems = {"ours": on, "off": off}

        def repeat(system: System) -> float:
            return system.decode([bench.prompts.repeating(192)], num_tokens)["tokens_per_s"]

        def plain(system: System) -> float:
            # Greedily this model soon repeats itself, whatever the prompt.
            assert isinstance(system, pods.Pod)
            return system.decode([bench.prompts.one(PROMPT_TOKENS)], num_tokens, HOT)["tokens_per_s"]

        for text, measure, goal in (("repeating", repeat, 2.0), ("random", plain, 0.97)):
            series = bench.turns(systems, measure, 1 if bench.quick else 3)
            what = f"3 stages 10 ms apart, {text} text, speculation on"
            bench.compare(SECTION, what, "tokens/s", series, {"off": Goal(goal)})
