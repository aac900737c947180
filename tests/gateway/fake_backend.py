"""A backend that answers with scripted tokens. Its tokenizer is one id per UTF-8 byte, so that characters and
stop strings cross token boundaries as often as they can."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from node.gateway.backend import (
    BackendRefusal,
    Caller,
    DashboardView,
    GeneratedToken,
    GenerationFailed,
    GenerationRequest,
    KeyRefused,
    LedgerState,
    MemberRow,
    ModelCard,
    ModelRow,
    ModelState,
    NodeRow,
    RateLimit,
    RequestRow,
    RequestState,
    ShardRow,
    StageSeconds,
    TokenTime,
    TreasuryState,
    Usage,
)
from node.links.frames import FinishReason

EOS = 256
VOCAB_SIZE = 257
KEY = "sk-pod-alice"
REVOKED_KEY = "sk-pod-revoked"
NARROW_KEY = "sk-pod-narrow"
LIMITED_KEY = "sk-pod-limited"
LIMITED_TOKENS = 50
MODEL = "tiny"
OTHER_MODEL = "org/other"
CONTEXT_TOKENS = 400
ROUTE = "ada[0:2),bo[2:4)"
ALICE = Caller(b"A" * 32, "alice", b"k" * 16)
NARROW = replace(ALICE, key_id=b"n" * 16, models=(OTHER_MODEL,))
LIMITED = replace(ALICE, key_id=b"l" * 16, max_num_tokens_per_minute=LIMITED_TOKENS)


class ByteTokenizer:
    eos_token_ids = (EOS,)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        roles = [message["role"] for message in messages]
        if "assistant" in roles[:1]:
            raise ValueError("the conversation must not start with the assistant")
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>")

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return bytes(id_ for id_ in ids if id_ < EOS).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < EOS else b"<end>"


def with_logprobs(token: GeneratedToken, num_top: int) -> GeneratedToken:
    """As the last stage would say: the token itself, then those before it, each half as likely."""
    if num_top < 0:
        return token
    top = tuple((max(0, token.token_id - n), -math.log(2) * (n + 1)) for n in range(num_top))
    return replace(token, logprob=-math.log(2), top_logprobs=top)


def tokens_of(text: str, finish: FinishReason = FinishReason.STOP) -> list[GeneratedToken]:
    """The bytes of `text` and the end-of-sequence token."""
    body = [GeneratedToken(byte, FinishReason.NONE) for byte in text.encode()]
    return [*body, GeneratedToken(EOS, finish)]


@dataclass
class Script:
    """What one generation does: `tokens`, pausing before the one at `pause_at` until `go`, then `error`.

    `is_paced`: between two tokens others may run. `refusal`: it does not even begin.
    """

    tokens: list[GeneratedToken] = field(default_factory=lambda: tokens_of("Hello, wörld 🌍!"))
    pause_at: int | None = None
    go: asyncio.Event = field(default_factory=asyncio.Event)
    error: BackendRefusal | None = None
    is_paced: bool = False
    refusal: BackendRefusal | None = None


class FakeGeneration:
    def __init__(
        self,
        request: GenerationRequest,
        script: Script,
        route_text: str,
        places: asyncio.Semaphore | None,
    ) -> None:
        self.session = bytes(16)
        self.route_text = route_text
        self.num_prompt_tokens = len(request.prompt_ids)
        self.request = request
        self.script = script
        self.settlements: list[int] = []
        self.num_yielded = 0
        self.num_delivered = 0
        self.closed = False
        self._places = places

    async def tokens(self) -> AsyncGenerator[GeneratedToken, None]:
        limit = self.request.sampling.max_num_output_tokens
        num_top = self.request.sampling.num_top_logprobs
        try:
            for index, plain in enumerate(self.script.tokens):
                token = with_logprobs(plain, num_top)
                if index == self.script.pause_at:
                    await self.script.go.wait()
                if self.script.is_paced:
                    await asyncio.sleep(0)
                self.num_yielded += 1
                if self.num_yielded == limit and token.finish_reason is FinishReason.NONE:
                    yield replace(token, finish_reason=FinishReason.LENGTH)
                    return
                yield token
            if self.script.error is not None:
                raise self.script.error
        finally:
            self.closed = True

    def delivered(self, num_output_tokens: int) -> None:
        self.num_delivered = num_output_tokens

    async def settle(self, num_output_tokens: int) -> Usage:
        self.settlements.append(num_output_tokens)
        await asyncio.sleep(0)
        if self._places is not None:
            self._places.release()
        return Usage(self.num_prompt_tokens, 0, num_output_tokens)


class FakeBackend:
    def __init__(self) -> None:
        self.scripts: deque[Script] = deque()
        self.refusal: BackendRefusal | None = None
        self.generations: list[FakeGeneration] = []
        self.callers: list[Caller] = []
        self.revoked: set[bytes] = set()
        self.num_pending = 0
        self.open_hangs = False
        # So many generations may be open at once; others wait.
        self.places: asyncio.Semaphore | None = None
        self.route_text = ROUTE
        self.view = example_view()
        self.limits: tuple[RateLimit, ...] = ()
        self._watchers: set[asyncio.Event] = set()

    async def authenticate(self, bearer: str) -> Caller:
        callers = {KEY: ALICE, NARROW_KEY: NARROW, LIMITED_KEY: LIMITED}
        if bearer == REVOKED_KEY:
            raise KeyRefused("Incorrect API key provided: it was revoked.")
        if bearer not in callers:
            raise KeyRefused("Incorrect API key provided: it is malformed.")
        return callers[bearer]

    def rate_limits(self, caller: Caller) -> tuple[RateLimit, ...]:
        return self.limits

    def may_view(self, member: bytes, key_id: bytes) -> bool:
        return member == ALICE.member and key_id not in self.revoked

    def models(self) -> list[ModelCard]:
        return [
            ModelCard(name, 1_700_000_000, "pod", VOCAB_SIZE, CONTEXT_TOKENS, ready=True)
            for name in (MODEL, OTHER_MODEL)
        ]

    async def tokenizer(self, model: str) -> ByteTokenizer:
        return ByteTokenizer()

    async def generate(self, caller: Caller, request: GenerationRequest) -> FakeGeneration:
        self.num_pending += 1
        try:
            if self.open_hangs:
                await asyncio.Event().wait()
            if self.places is not None:
                await self.places.acquire()
        finally:
            self.num_pending -= 1
        if self.refusal is not None:
            raise self.refusal
        script = self.scripts.popleft() if self.scripts else Script()
        if script.refusal is not None:
            raise script.refusal
        generation = FakeGeneration(request, script, self.route_text, self.places)
        self.callers.append(caller)
        self.generations.append(generation)
        return generation

    def dashboard(self) -> DashboardView:
        return self.view

    async def changes(self) -> AsyncGenerator[None, None]:
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while True:
                await changed.wait()
                changed.clear()
                yield None
        finally:
            self._watchers.discard(changed)

    def show(self, view: DashboardView) -> None:
        self.view = view
        for changed in self._watchers:
            changed.set()


def failing(text: str) -> Script:
    """Says `text`, then its stage dies."""
    return Script(tokens_of(text)[:-1], error=GenerationFailed("stage bo[2:4) is gone"))


EXAMPLE_MODEL = ModelRow(
    "smollm2-135m",
    30,
    134_515_008,
    "bfloat16",
    8192,
    ModelState.READY,
    tokens_per_s=41.27,
    predicted_tokens_per_s=45.5,
    token_times=(
        TokenTime("ada-desktop[0:10)", 7000.0, 10.0, 120.0, 7130.0),
        TokenTime("bo-macbook[10:20)", 7100.0, 10.0, 120.0, 7230.0),
        TokenTime("cy-server[20:30)", 9000.0, 10.0, 120.0, 9130.0),
        TokenTime("head and links", 0, 0, 0, 740.0),
    ),
)


def example_view() -> DashboardView:
    """Three members on three nodes, one model split over them."""
    members = [
        MemberRow(b"A" * 32, "alice", "owner", 812_345_678, 10_240, 1_884, 912_345_678, 100_000_000),
        MemberRow(b"B" * 32, "bob", "member", -312_345_678, 5_120, 9_312, 187_654_322, 500_000_000),
        MemberRow(b"C" * 32, "carol", "guest", 0, 0, 0, 0, 0),
    ]
    nodes = [
        _node(b"1" * 32, "ada-desktop", "alice", 0, 10, True, "cuda: RTX 4090"),
        _node(b"2" * 32, "bo-macbook", "bob", 10, 20, False, "mps: Apple M4 Max"),
        _node(b"3" * 32, "cy-server", "carol", 20, 30, False, "cpu"),
    ]
    return DashboardView(
        pod_name="team-pod",
        node_name="ada-desktop",
        member_name="alice",
        members=tuple(members),
        treasury_microcredits=500_000_000,
        issuance_microcredits=-1_000_000_000,
        treasury=TreasuryState(
            policy_name="2-e4b8d",
            levy_per_mille=25,
            dividend_per_mille=500,
            dividend_period_s=7 * 86_400,
            credit_line_microcredits=500_000_000,
            levied_microcredits=12_500_000,
            granted_microcredits=600_000_000,
            dividends_paid_microcredits=4_200_000,
            dividends_due_microcredits=2_050_000,
        ),
        nodes=tuple(nodes),
        models=(EXAMPLE_MODEL,),
        requests=(example_request(1),),
        ledger=LedgerState(214, 3, bytes(range(32)), 0),
        stage_seconds=(StageSeconds("smollm2-135m", "ada-desktop", 128, 0.5, 0.25, 0.125),),
    )


def example_request(number: int) -> RequestRow:
    return RequestRow(
        session=number.to_bytes(16, "big"),
        time_ms=1_764_000_000_000 + number * 61_000,
        member_name="alice",
        model_name="smollm2-135m",
        route_text="ada-desktop[0:10),bo-macbook[10:20),cy-server[20:30)",
        num_prompt_tokens=37,
        num_output_tokens=128,
        tokens_per_s=41.27,
        price_microcredits=22_195_000,
        state=RequestState.SETTLED,
    )


def _node(
    node: bytes, name: str, member: str, start: int, end: int, is_this_node: bool, device: str
) -> NodeRow:
    shard = ShardRow("smollm2-135m", start, end, 1000, 1 if is_this_node else 0)
    return NodeRow(
        node, name, member, device, 16 * 2**30, True, is_this_node, f"10.0.0.{start + 1}:7421", (shard,)
    )
