"""From starting a process to its first token, weights on disk (and in the page cache).

Ours: `pod up` of a node that has served the model before; then a request as soon as the API listens.
"""

from __future__ import annotations

import time

from benchmarks import pods
from benchmarks.bench import Bench, one_line
from benchmarks.client import StreamError, complete_all
from benchmarks.peers import process
from benchmarks.report import Goal, Line

SECTION = "start"
PROMPT_TOKENS = 32
TIMEOUT_S = 120.0
RETRY_S = 0.05


def run(bench: Bench) -> None:
    ours, theirs, failure = [], [], "" if bench.wants("llama.cpp") else "left out"
    with pods.pod(1, pods.num_cores()) as pod:
        for _ in range(1 if bench.quick else 3):
            if not failure:
                try:
                    theirs.append(_llama_s(bench))
                except process.PeerError as error:
                    failure = one_line(error)
            ours.append(_node_s(bench, pod))
    limit = Goal(10.0, at_least=False, of_ratio=False)
    what = "start to first token, weights on disk"
    bench.add(Line(SECTION, what, "s", tuple(ours), "llama.cpp", tuple(theirs), limit, failure))


def _node_s(bench: Bench, pod: pods.Pod) -> float:
    node = pod.nodes[0]
    node.stop()
    # The same address again, as a service has it.
    address = f"{pod.endpoint.host}:{pod.endpoint.port}"
    start_s = time.perf_counter()
    node.start("up", *node.options, "--api", address)
    node.wait_until_up()
    prompt = [bench.prompts.one(PROMPT_TOKENS)]
    while True:
        try:
            return complete_all(pod.endpoint, prompt, 1)[0].times[0] - start_s
        except (StreamError, OSError):
            if time.perf_counter() - start_s > TIMEOUT_S:
                raise
            time.sleep(RETRY_S)


def _llama_s(bench: Bench) -> float:
    start_s = time.perf_counter()
    peer = process.llama(bench.model_file, pods.num_cores())
    try:
        peer.ask("decode", prompts=[bench.prompts.one(PROMPT_TOKENS)], num_tokens=1)
        return time.perf_counter() - start_s
    finally:
        peer.stop()
