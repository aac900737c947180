"""What an engine process keeps in memory after 16 streams and long prompts: is it what was promised?

The node is told how much memory weights and KV cache may take, little enough for the work to fill the cache;
what it does not keep for the KV cache does not count as allowed.
"""

from __future__ import annotations

from benchmarks import pods
from benchmarks.bench import Bench, Peer
from benchmarks.report import Goal, Line

SECTION = "memory"
BUDGET_BYTES = 384 << 20
# A node keeps half of what the weights leave for the KV cache of its next shard.
KV_SHARE = 0.5
OVERHEAD_BYTES = 450 << 20
MIB = 1 << 20


def run(bench: Bench) -> None:
    bench.say("starting a pod of one node with a memory limit")
    with pods.pod(1, pods.num_cores(), options=("--memory", f"{BUDGET_BYTES}B")) as pod:
        _work(bench, pod)
        engine = pod.nodes[0].engine()
        resident = engine.memory_info().rss
        weights = pod.nodes[0].pod("status")["models"][0]["num_weight_bytes"]
    llama = bench.peers("llama.cpp")["llama.cpp"]
    kv = (BUDGET_BYTES - weights) * KV_SHARE
    what = "engine process, resident, after 16 streams and two prompts of 2048"
    allowed = (weights + kv + OVERHEAD_BYTES) / MIB
    limit = Goal(1.0, at_least=False)
    peer = f"weights ({weights / MIB:.0f}) + KV budget ({kv / MIB:.0f}) + {OVERHEAD_BYTES // MIB} MiB"
    bench.add(Line(SECTION, what, "MiB", (resident / MIB,), peer, (allowed,), limit))
    if isinstance(llama, Peer):
        _work(bench, llama)
        theirs = (llama.process.memory_bytes() / MIB,)
        bench.add(Line(SECTION, what, "MiB", (resident / MIB,), "llama.cpp", theirs))
    else:
        bench.add(Line(SECTION, what, "MiB", (resident / MIB,), "llama.cpp", missing=str(llama)))


def _work(bench: Bench, system: pods.Pod | Peer) -> None:
    bench.prompts.start(-1)
    system.decode(bench.prompts.many(16, 32), 32)
    for _ in range(2):
        system.decode([bench.prompts.one(2048)], 8)
