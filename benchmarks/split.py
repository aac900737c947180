"""The model split over three nodes with one thread each, against whole on the same cores and against RPC."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from benchmarks import pods
from benchmarks.bench import Bench, Peer, Series, System, one_line
from benchmarks.peers import process
from benchmarks.report import Goal

SECTION = "split"
NUM_STAGES = 3
PROMPT_TOKENS = 32
RPC = "llama.cpp RPC, 3 servers"
WHOLE_ONE_THREAD = "whole, one thread"
WHOLE = "whole, one thread per core"
# Measured once on another machine, with patches that made it start (see docs/performance.md).
PETALS, PETALS_TOKENS_PER_S = "Petals, 3 servers (measured elsewhere)", 9.4
RPC_ELSEWHERE, RPC_ELSEWHERE_TOKENS_PER_S = "llama.cpp RPC (measured elsewhere)", 54.0


def run(bench: Bench) -> None:
    whole = bench.whole()
    with contextlib.ExitStack() as stack:
        bench.say("starting a pod of three nodes and one of one node with one thread")
        split = stack.enter_context(pods.pod(NUM_STAGES, 1))
        narrow = stack.enter_context(pods.pod(1, 1))
        rpc = stack.enter_context(rpc_client(bench))
        _one_stream(bench, {"ours": split, WHOLE_ONE_THREAD: narrow, RPC: rpc})
        _many_streams(bench, {"ours": split, WHOLE: whole, RPC: rpc})
        _prefill(bench, {"ours": split, WHOLE: whole, RPC: rpc})


def _one_stream(bench: Bench, systems: Mapping[str, System | str]) -> None:
    num_tokens = 24 if bench.quick else 64

    def measure(system: System) -> float:
        return system.decode(bench.prompts.many(1, PROMPT_TOKENS), num_tokens)["tokens_per_s"]

    series = bench.turns(systems, measure)
    series[PETALS] = Series([PETALS_TOKENS_PER_S])
    series[RPC_ELSEWHERE] = Series([RPC_ELSEWHERE_TOKENS_PER_S])
    goals = {WHOLE_ONE_THREAD: Goal(0.9), RPC: Goal(1.2), RPC_ELSEWHERE: Goal(1.2), PETALS: Goal(6.0)}
    bench.compare(SECTION, "3 stages, 1 stream, one thread each", "tokens/s", series, goals)


def _many_streams(bench: Bench, systems: Mapping[str, System | str]) -> None:
    num_tokens = 32 if bench.quick else 64

    def measure(system: System) -> float:
        return system.decode(bench.prompts.many(16, PROMPT_TOKENS), num_tokens)["tokens_per_s"]

    series = bench.turns(systems, measure)
    goals = {WHOLE: Goal(0.9), RPC: Goal(3.0)}
    bench.compare(SECTION, "3 stages on the same cores, 16 streams, sum", "tokens/s", series, goals)


def _prefill(bench: Bench, systems: Mapping[str, System | str]) -> None:
    def measure(system: System) -> float:
        return 512 / system.decode([bench.prompts.one(512)], 1)["first_s"]

    series = bench.turns(systems, measure, 1 if bench.quick else 3)
    bench.compare(SECTION, "3 stages, prefill 512", "tokens/s", series, {WHOLE: None, RPC: None})


@contextlib.contextmanager
def rpc_client(bench: Bench) -> Iterator[System | str]:
    """llama.cpp with its layers on three RPC servers, one thread each; or why not."""
    with contextlib.ExitStack() as stack:
        system: System | str
        try:
            if not bench.wants("llama.cpp"):
                raise process.PeerError("left out")
            servers = stack.enter_context(process.llama_rpc_servers(NUM_STAGES))
            client = process.llama(bench.model_file, 1, servers)
            stack.callback(client.stop)
            system = Peer(client)
            bench.report.drivers[RPC] = (
                "ggml-rpc-server on loopback with one thread each, the layers shared out over them, "
                "driven like llama.cpp"
            )
        except (process.PeerError, OSError) as error:
            system = one_line(error)
        yield system
