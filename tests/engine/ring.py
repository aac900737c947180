"""Engines and a head in one process, on in-memory links: open sessions, collect tokens, count frames."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ledger.rate_card import DEFAULT_RATE_CARD, price
from ledger.receipt import Receipt, SignedReceipt, sign_as_head
from node.engine.admission import MAX_NUM_SESSIONS
from node.engine.engine import Engine
from node.engine.events import EngineEvent, SessionEnded
from node.engine.loaded import LoadedShard
from node.engine.prefix_hashes import prefix_hashes
from node.engine.provision import provision
from node.engine.scheduler import StepLimits
from node.links.frames import (
    CloseSession,
    FinishReason,
    Frame,
    OpenSession,
    ReceiptSigned,
    Sampling,
    SessionError,
    SessionOpened,
    SignReceipt,
    Stage,
    StageTiming,
    StartSession,
    TokenBatch,
    TokenItem,
)
from node.links.memory_links import MemoryHead, MemoryLinks, MemoryNetwork
from node.models.package import ModelPackage
from pod.identity import KeyPair

POD = bytes(range(32))
TIMEOUT_S = 60.0
GREEDY = Sampling(temperature=0, max_num_output_tokens=16, ignore_eos=True)


def wait_until(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not within the deadline"
        time.sleep(0.002)


@dataclass
class Heard:
    """What the head heard of one session."""

    tokens: list[int] = field(default_factory=list)
    items: list[TokenItem] = field(default_factory=list)
    finish_reason: FinishReason = FinishReason.NONE
    opened: set[int] = field(default_factory=set)
    cached: dict[int, int] = field(default_factory=dict)
    errors: list[SessionError] = field(default_factory=list)
    receipts: list[SignedReceipt] = field(default_factory=list)
    timings: list[StageTiming] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self.finish_reason is not FinishReason.NONE or bool(self.errors)


class Ring:
    """`cuts` are the layers where the model is split: () is whole. Spares are for the last stage."""

    def __init__(
        self,
        package: ModelPackage,
        cuts: Sequence[int] = (),
        kv_tokens: int = 2048,
        limits: StepLimits | None = None,
        clock_ms: Callable[[], int] | None = None,
        caches_prefixes: bool = False,
        num_spares: int = 0,
        hidden_bits: int = 16,
        max_num_sessions: int = MAX_NUM_SESSIONS,
    ) -> None:
        self.package = package
        self.max_num_sessions = max_num_sessions
        self.hidden_bits = hidden_bits
        self.caches_prefixes = caches_prefixes
        self.network = MemoryNetwork()
        self.events: list[EngineEvent] = []
        self.heard: dict[bytes, Heard] = {}
        self._lock = threading.Lock()
        self._to_sign: dict[bytes, OpenSession] = {}
        self._session_ids = (hashlib.sha256(bytes([n])).digest()[:16] for n in itertools.count())
        self.head_key = KeyPair.of_seed(bytes([255]) * 32)
        self.engines: list[Engine] = []
        self.shards: list[LoadedShard] = []
        bounds = [0, *cuts, package.manifest.num_layers]
        stages = []
        for index, (start, end) in enumerate(itertools.pairwise(bounds)):
            key = KeyPair.of_seed(bytes([index]) * 32)
            self._add_engine(key, start, end, kv_tokens, limits, clock_ms)
            stages.append(Stage(key.public, "memory:0", start, end))
        self.route = tuple(stages)
        self.spare_nodes: list[bytes] = []
        for number in range(num_spares):
            key = KeyPair.of_seed(bytes([100 + number]) * 32)
            self._add_engine(key, bounds[-2], bounds[-1], kv_tokens, limits, clock_ms)
            self.spare_nodes.append(key.public)
        self.head = MemoryHead(self.network, self.head_key.public, self._on_frame, lambda *_: None)
        for stage in self.route:
            self.head.connect(stage.node)

    def _add_engine(
        self,
        key: KeyPair,
        start: int,
        end: int,
        kv_tokens: int,
        limits: StepLimits | None,
        clock_ms: Callable[[], int] | None,
    ) -> None:
        engine = Engine(
            key.public,
            POD,
            key.sign,
            lambda on_frame, on_link, on_head: MemoryLinks(
                self.network, key.public, on_frame, on_link, on_head
            ),
            self.events.append,
            **({"clock_ms": clock_ms} if clock_ms else {}),
            limits=limits,
            hidden_bits=self.hidden_bits,
            max_num_sessions=self.max_num_sessions,
        )
        loaded = load(self.package, start, end, kv_tokens)
        engine.add_shard(loaded)
        engine.start()
        self.engines.append(engine)
        self.shards.append(loaded)

    def close(self) -> None:
        self.head.close()
        for engine in self.engines:
            engine.stop()

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def opening(self, prompt_ids: Sequence[int], sampling: Sampling = GREEDY) -> OpenSession:
        """What the first stage is sent."""
        return OpenSession(
            session=next(self._session_ids),
            model=self.package.manifest.model_id,
            route=self.route,
            stage_index=0,
            head=self.head_key.public,
            payer=bytes(32),
            key_id=bytes(16),
            hold_microcredits=0,
            num_prompt_tokens=len(prompt_ids),
            sampling=sampling,
            deadline_ms=2**52,
            rate_card_version=DEFAULT_RATE_CARD.version,
            prompt_ids=tuple(prompt_ids),
            prefix_hashes=prefix_hashes(self.package.manifest.model_id, self.head_key.public, prompt_ids)
            if self.caches_prefixes
            else (),
        )

    def open(self, opening: OpenSession) -> Heard:
        """Open at every stage; wait until all have answered."""
        heard = self.heard.setdefault(opening.session, Heard())
        for index in range(len(opening.route)):
            self.send_opening(opening, index)
        wait_until(lambda: len(heard.opened) == len(opening.route) or bool(heard.errors))
        return heard

    def send_opening(self, opening: OpenSession, index: int) -> None:
        """To one stage."""
        self.heard.setdefault(opening.session, Heard())
        is_last = index == len(opening.route) - 1
        needs_ids = is_last and opening.sampling.needs_prompt(opening.num_output_tokens_before)
        ids = opening.prompt_ids if index == 0 or needs_ids else ()
        self.head.send(opening.route[index].node, replace(opening, stage_index=index, prompt_ids=ids))

    def start(self, opening: OpenSession) -> None:
        """After what all stages have in their caches."""
        num_cached_tokens = min(self.heard[opening.session].cached.values(), default=0)
        self.head.send(opening.route[0].node, StartSession(opening.session, num_cached_tokens))

    def close_session(self, opening: OpenSession) -> None:
        for stage in opening.route:
            self.head.send(stage.node, CloseSession(opening.session))

    def generate(self, prompts: Sequence[Sequence[int]], *samplings: Sampling) -> list[list[int]]:
        """All prompts at once; their output tokens. Sessions are closed afterwards."""
        chosen = samplings if len(samplings) == len(prompts) else (samplings or (GREEDY,)) * len(prompts)
        openings = [self.opening(prompt, one) for prompt, one in zip(prompts, chosen, strict=True)]
        for opening in openings:
            self.sign_for(opening)
        heards = [self.open(opening) for opening in openings]
        for opening in openings:
            self.start(opening)
        wait_until(lambda: all(heard.is_over for heard in heards))
        for opening in openings:
            self.close_session(opening)
        assert not [heard.errors for heard in heards if heard.errors]
        return [heard.tokens for heard in heards]

    def receipt(
        self,
        opening: OpenSession,
        stage_index: int,
        sequence: int,
        prompt: int,
        output: int,
        cached: int = 0,
    ) -> Receipt:
        stage, manifest = opening.route[stage_index], self.package.manifest
        num_parameters = manifest.stage_num_parameters(stage.start_layer, stage.end_layer)
        return Receipt(
            pod=POD,
            session=opening.session,
            stage_index=stage_index,
            head=opening.head,
            payer=opening.payer,
            key_id=opening.key_id,
            stage=stage.node,
            model=opening.model,
            start_layer=stage.start_layer,
            end_layer=stage.end_layer,
            num_parameters=num_parameters,
            rate_card_version=opening.rate_card_version,
            sequence=sequence,
            num_prompt_tokens=prompt,
            num_cached_tokens=cached,
            num_output_tokens=output,
            amount_microcredits=price(DEFAULT_RATE_CARD, num_parameters, prompt, cached, output),
        )

    def send_receipt(self, receipt: Receipt) -> None:
        signed = sign_as_head(receipt, self.head_key.sign)
        self.head.send(receipt.stage, SignReceipt(receipt.session, signed.encode()))

    def sign_for(self, opening: OpenSession) -> None:
        """As an honest head does, at the first token: for without it a stage soon stops."""
        self._to_sign[opening.session] = opening

    def _sign_first(self, session: bytes) -> None:
        opening = self._to_sign.pop(session, None)
        if opening is not None:
            num_cached_tokens = min(self.heard[session].cached.values(), default=0)
            for index in range(len(opening.route)):
                num_tokens = opening.num_prompt_tokens
                self.send_receipt(self.receipt(opening, index, 1, num_tokens, 1, num_cached_tokens))

    def ended(self) -> list[SessionEnded]:
        return [event for event in self.events if isinstance(event, SessionEnded)]

    def all_kv_free(self) -> bool:
        return all(loaded.cache.num_free_tokens == loaded.cache.num_tokens for loaded in self.shards)

    def _on_frame(self, stage: bytes, frame: Frame) -> None:
        with self._lock:
            match frame:
                case TokenBatch():
                    for item in frame.items:
                        self.heard[item.session].tokens.append(item.token_id)
                        self.heard[item.session].items.append(item)
                        self.heard[item.session].finish_reason = item.finish_reason
                        self._sign_first(item.session)
                case SessionOpened():
                    self.heard[frame.session].cached[frame.stage_index] = frame.num_cached_tokens
                    self.heard[frame.session].opened.add(frame.stage_index)
                case SessionError():
                    self.heard[frame.session].errors.append(frame)
                case ReceiptSigned():
                    self.heard[frame.session].receipts.append(SignedReceipt.decode(frame.receipt))
                case StageTiming():
                    self.heard[frame.session].timings.append(frame)


def load(package: ModelPackage, start: int, end: int, kv_tokens: int = 2048) -> LoadedShard:
    manifest = package.manifest
    values = manifest.num_kv_values_per_token_per_layer * (end - start)
    return provision(
        manifest,
        package.directory,
        package.weights,
        start,
        end,
        torch.float32,
        torch.device("cpu"),
        max_num_kv_bytes=kv_tokens * values * 4,
        progress=lambda *_: None,
    )
