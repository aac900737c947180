"""A head among stages that live in the test: real subscriptions, real keys, a ledger in memory.

`Links` stands where `HeadLinks` does; each stage answers a frame the way its script says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from ledger.ledger import MEMORY_URL, Ledger
from ledger.receipt import SignedReceipt, co_sign
from node.ledger_thread import LedgerThread
from node.links.frames import (
    ErrorCode,
    FinishReason,
    Frame,
    OpenSession,
    ReceiptSigned,
    Sampling,
    SessionError,
    SessionOpened,
    SignReceipt,
    Stage,
    StartSession,
    TokenBatch,
    TokenItem,
)
from node.links.head_links import HeadLinks
from node.links.subscriptions import Subscription, Subscriptions
from node.models.manifest import FileDigest, Manifest
from node.sessions.head import Head, SessionRequest
from tests.ledger.world import POD, World

MANIFEST = Manifest(
    name="small",
    model_type="llama",
    hidden_size=8,
    vocab_size=100,
    max_context_tokens=1024,
    dtype="float32",
    weights=(FileDigest("model.safetensors", 1, bytes(32)),),
    bundle=(),
    layer_num_parameters=(1_000_001, 1_000_001),
    embedding_num_parameters=500,
    head_num_parameters=700,
    num_kv_values_per_token_per_layer=8,
    eos_token_ids=(0,),
)
PROMPT = (5, 6, 7)


@dataclass
class FakeStage:
    """Answers as an honest stage does; a test changes what it wants to see."""

    number: int
    num_refusals: int = 0
    num_tokens: int = 4
    finish: FinishReason = FinishReason.LENGTH
    co_signs: bool = True
    said: list[Frame] = field(default_factory=list)


class Links:
    """What the head sends is answered at once, into the real subscriptions."""

    def __init__(self, world: World, stages: list[FakeStage]) -> None:
        self.subscriptions = Subscriptions()
        self._world = world
        self.stages = {world.nodes[stage.number].public: stage for stage in stages}
        self.openings: list[OpenSession] = []
        self.on_start: Callable[[bytes], None] = self.make_tokens

    async def connect(self, node: bytes, address: str, timeout_s: float) -> None:
        await asyncio.sleep(0)

    def subscribe(self, session: bytes) -> Subscription:
        return self.subscriptions.open(session)

    def send(self, node: bytes, frame: Frame) -> None:
        stage = self.stages[node]
        stage.said.append(frame)
        match frame:
            case OpenSession(session=session, stage_index=index) if stage.num_refusals:
                stage.num_refusals -= 1
                self.openings.append(frame)
                self.subscriptions.received(
                    node, SessionError(session, index, ErrorCode.NO_KV_ROOM, "no room")
                )
            case OpenSession(session=session, stage_index=index):
                self.openings.append(frame)
                self.subscriptions.received(node, SessionOpened(session, index))
            case StartSession(session=session):
                self.on_start(session)
            case SignReceipt(session=session, receipt=raw) if stage.co_signs:
                signed = co_sign(SignedReceipt.decode(raw), self._world.nodes[stage.number].sign)
                self.subscriptions.received(node, ReceiptSigned(session, signed.encode()))
            case _:
                pass

    def make_tokens(self, session: bytes) -> None:
        """The last stage's tokens, one batch each."""
        node, stage = list(self.stages.items())[-1]
        for number in range(stage.num_tokens):
            is_last = number == stage.num_tokens - 1
            self.say_token(node, session, number, stage.finish if is_last else FinishReason.NONE)

    def say_token(self, node: bytes, session: bytes, number: int, finish: FinishReason) -> None:
        item = TokenItem(session, len(PROMPT) + number, 40 + number % 50, finish)
        self.subscriptions.received(node, TokenBatch((item,)))


class Pod:
    """Node 0 is the head, or another; nodes 1 and 2 are the stages of a route over two layers."""

    def __init__(
        self,
        url: str = MEMORY_URL,
        number: int = 0,
        check_credit: Callable[[bytes], None] = lambda member: None,
    ) -> None:
        self.world = World()
        node = self.world.nodes[number]
        self.node = node.public
        self.first, self.last = FakeStage(1), FakeStage(2)
        self.links = Links(self.world, [self.first, self.last])
        self.ledger: Ledger = self.world.ledger(number, url)
        self.thread = LedgerThread(self.ledger)
        self.head = Head(
            pod=POD,
            node=node.public,
            sign=node.sign,
            links=cast(HeadLinks, self.links),
            ledger=self.thread,
            find_route=lambda model, avoided: self.route,
            clock_ms=self.world.clock,
            check_credit=check_credit,
        )

    @property
    def route(self) -> tuple[Stage, ...]:
        nodes = list(self.links.stages)
        return tuple(Stage(node, "127.0.0.1:1", index, index + 1) for index, node in enumerate(nodes))

    def request(self, max_num_output_tokens: int = 4) -> SessionRequest:
        return SessionRequest(
            payer=self.world.members[0],
            key_id=bytes(16),
            model=MANIFEST.model_id,
            manifest=MANIFEST,
            prompt_ids=PROMPT,
            sampling=Sampling(max_num_output_tokens=max_num_output_tokens),
        )
