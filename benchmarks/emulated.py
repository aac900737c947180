"""Three stages with slow links between them: a relay in front of each node's stage links delays every hop.

One stream. The allowance for a token is three times the one-way delay, the time the same split takes without
delay (measured in turns with it), and one millisecond. Only stage links are delayed, not the control plane.
"""

from __future__ import annotations

import contextlib

from benchmarks import pods
from benchmarks.bench import Bench, System
from benchmarks.report import Goal, Line

SECTION = "emulated"
NUM_STAGES = 3
PROMPT_TOKENS = 32
DELAYS_MS = (1, 10, 50)
MARGIN_MS = 1.0
NO_DELAY = "the same without delay"


def run(bench: Bench) -> None:
    with pods.pod(NUM_STAGES, 1) as direct:
        for delay_ms in DELAYS_MS:
            bench.say(f"starting a pod of three nodes, {delay_ms} ms apart")
            with pods.pod(NUM_STAGES, 1, delay_s=delay_ms / 1e3) as slow:
                _allowance(bench, {"ours": slow, NO_DELAY: direct}, delay_ms)
                if delay_ms == 10:
                    _repeating(bench, slow)


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


def _repeating(bench: Bench, slow: pods.Pod) -> None:
    """Text that repeats, with speculation and without."""
    options = pods.speculation_options()
    what = "3 stages 10 ms apart, repeating text, speculation on"
    if options is None:
        bench.add(Line(SECTION, what, "tokens/s", (), "off", goal=Goal(2.0), missing="no such option yet"))
        return
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(pods.pod(NUM_STAGES, 1, delay_s=0.010, options=options))
        systems = {"ours": other, "off": slow}

        def measure(system: System) -> float:
            return system.decode([bench.prompts.repeating(192)], 60 if bench.quick else 150)["tokens_per_s"]

        series = bench.turns(systems, measure, 1 if bench.quick else 3)
        bench.compare(SECTION, what, "tokens/s", series, {"off": Goal(2.0)})
