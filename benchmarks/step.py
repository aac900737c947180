"""What a step costs besides the model: schedule, tensors, accounts, greedy sampling, frames to the links.

`python -m benchmarks.step` prints the median and the 99th percentile per step for 1 and 16 sessions, as a
whole model and as the first, a middle and the last of three stages. The runner computes nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch

from ledger.receipt import Sign
from node.engine.engine import Engine
from node.engine.kv_cache import KvCache
from node.engine.loaded import LoadedShard
from node.links.codec import encode
from node.links.frames import (
    Dtype,
    Frame,
    HiddenBatch,
    HiddenItem,
    OpenSession,
    Sampling,
    Stage,
    StartSession,
    TokenBatch,
    TokenItem,
)
from node.links.port import StageLinks
from node.models.manifest import FileDigest, Manifest
from node.speed import Speed

HIDDEN_SIZE, VOCAB_SIZE, NUM_LAYERS = 576, 49152, 30
NUM_STEPS = 240
NUM_WARM_UP = 40
NODES = [bytes([n]) * 32 for n in range(3)]
HEAD = b"h" * 32
PROMPT = tuple(range(10, 30))
MANIFEST = Manifest(
    name="fake",
    model_type="llama",
    hidden_size=HIDDEN_SIZE,
    vocab_size=VOCAB_SIZE,
    max_context_tokens=2048,
    dtype="float32",
    weights=(FileDigest("model.safetensors", 1, bytes(32)),),
    bundle=(),
    layer_num_parameters=(1,) * NUM_LAYERS,
    embedding_num_parameters=1,
    head_num_parameters=1,
    num_kv_values_per_token_per_layer=384,
    eos_token_ids=(0,),
)


class FakeRunner:
    """Rows and logits of the right shape, at no cost."""

    def __init__(self, start_layer: int, end_layer: int) -> None:
        self.start_layer, self.end_layer = start_layer, end_layer
        self.dtype, self.device, self.head_dim = torch.float32, torch.device("cpu"), 64
        self._rows = torch.zeros(512, HIDDEN_SIZE)
        self._logits = torch.randn(32, VOCAB_SIZE)

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        return self._rows[: len(ids_T)]

    def run(self, hidden_TD: torch.Tensor, *_: object) -> torch.Tensor:
        return self._rows[: len(hidden_TD)]

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        return self._logits[: len(hidden_BD)]


class FakeLinks:
    """Encodes each frame, as real links do on the loop's thread, and drops it."""

    def __init__(self) -> None:
        self.num_frames = 0

    def send(self, peer: bytes, frame: Frame, lane: object) -> None:
        encode(frame)
        self.num_frames += 1

    def send_to_head(self, head: bytes, frame: Frame) -> None:
        encode(frame)
        self.num_frames += 1

    def is_connected(self, peer: bytes) -> bool:
        return True

    def link_us(self, peer: bytes) -> int:
        return 0

    def can_send_bulk(self, peer: bytes) -> bool:
        return True

    def close(self) -> None:
        pass


class Bench:
    """One engine at place `index` of `route`, with `num_sessions` past their prompt."""

    def __init__(self, route: Sequence[Stage], index: int, num_sessions: int) -> None:
        self.route, self.index = route, index
        stage = route[index]
        sign: Sign = bytes
        self.engine = Engine(
            stage.node, bytes(32), sign, lambda *_: cast(StageLinks, FakeLinks()), lambda _: None
        )
        cache = KvCache(
            stage.start_layer, stage.start_layer + 1, 4096, 1, 1, torch.float32, torch.device("cpu")
        )
        runner = FakeRunner(stage.start_layer, stage.end_layer)
        loaded = LoadedShard(MANIFEST.model_id, MANIFEST, runner, cache, 0, 0, Speed((100,) * 3, (640, 2560)))  # type: ignore[arg-type]
        self.engine._shards.append(loaded)
        self.sessions = [n.to_bytes(16, "big") for n in range(num_sessions)]
        for session in self.sessions:
            self.open(session)
        self.position = len(PROMPT)
        while self.engine._book.ready and index > 0:
            self.engine.step()
        if index == 0:
            self.engine.step()

    def open(self, session: bytes) -> None:
        opening = OpenSession(
            session=session,
            model=MANIFEST.model_id,
            route=tuple(self.route),
            stage_index=self.index,
            head=HEAD,
            payer=bytes(32),
            key_id=bytes(16),
            hold_microcredits=0,
            num_prompt_tokens=len(PROMPT),
            sampling=Sampling(temperature=0, max_num_output_tokens=1000, ignore_eos=True),
            deadline_ms=2**50,
            rate_card_version=1,
            prompt_ids=PROMPT if self.index == 0 else (),
        )
        frame = self.engine._arrivals.frame
        frame(HEAD, opening)
        if self.index == 0:
            frame(HEAD, StartSession(session))
        else:
            frame(self.route[self.index - 1].node, self.hidden([session], 0, len(PROMPT)))

    def hidden(self, sessions: Sequence[bytes], position: int, num_tokens: int) -> HiddenBatch:
        items = tuple(HiddenItem(session, position, num_tokens) for session in sessions)
        rows = bytearray(4 * HIDDEN_SIZE * num_tokens * len(sessions))
        return HiddenBatch(items, Dtype.FLOAT32, HIDDEN_SIZE, memoryview(rows))

    def arrive(self) -> None:
        """The next input of every session, as it comes from the stage before."""
        if len(self.route) == 1:
            return
        peer = self.route[self.index - 1].node
        if self.index == 0:
            items = tuple(TokenItem(session, self.position, 7, 0) for session in self.sessions)  # type: ignore[arg-type]
            self.engine._arrivals.frame(peer, TokenBatch(items))
        else:
            self.engine._arrivals.frame(peer, self.hidden(self.sessions, self.position, 1))
        self.position += 1

    def sign(self) -> None:
        for session in self.engine._book.sessions.values():
            session.meter.num_signed_output_tokens = session.meter.num_output_tokens


def measure(bench: Bench) -> Mapping[str, float]:
    """Microseconds per step, from the frame in hand to the frame handed over."""
    times = []
    with torch.inference_mode():
        for _ in range(NUM_STEPS):
            bench.sign()
            started_s = time.perf_counter()
            bench.arrive()
            while bench.engine._book.ready:
                bench.engine.step()
                if len(bench.route) == 1:
                    break
            times.append((time.perf_counter() - started_s) * 1e6)
    times = sorted(times[NUM_WARM_UP:])
    return {"median": statistics.median(times), "p99": times[int(len(times) * 0.99)]}


def main(print_line: Callable[[str], None] = print) -> None:
    torch.set_num_threads(1)
    whole = [Stage(NODES[0], "x:1", 0, NUM_LAYERS)]
    split = [Stage(node, "x:1", n * 10, n * 10 + 10) for n, node in enumerate(NODES)]
    print_line("| place | sessions | median us | p99 us |\n|---|---|---|---|")
    for name, route, index in [
        ("whole", whole, 0),
        ("first of 3", split, 0),
        ("middle of 3", split, 1),
        ("last of 3", split, 2),
    ]:
        for num_sessions in (1, 16):
            found = measure(Bench(route, index, num_sessions))
            print_line(f"| {name} | {num_sessions} | {found['median']:.0f} | {found['p99']:.0f} |")


if __name__ == "__main__":
    main()
