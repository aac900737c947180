"""What the gateway and the dashboard ask of the node, and the plain values they get back.

The gateway checks HTTP, keys' format, parameters and text; everything behind (roster, ledger, placement,
sessions) is one `Backend`, implemented by `node/runtime` and by a small fake in the tests. This file knows
none of them. Every refusal is one of the exceptions below; `errors.py` gives each its HTTP status.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

from node.links.frames import FinishReason, Sampling


class BackendRefusal(Exception):
    """The node says no. `str(error)` is one line for the caller; it names no path and no secret."""


class KeyRefused(BackendRefusal):
    """401: malformed, not of this pod, unknown member, expired or revoked."""


class NoRoute(BackendRefusal):
    """503: no live nodes cover the model's layers, or the request can never fit."""


class QuotaExceeded(BackendRefusal):
    """429, not to be retried: the pod is busy, and the member past its credit line."""


class WaitedTooLong(BackendRefusal):
    """429, to be retried after `retry_after_s`: there was no room for the request in time."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(BackendRefusal):
    """429: the API key's limit per minute. To be retried after `retry_after_s`; None: it can never fit."""

    def __init__(self, message: str, unit: Literal["requests", "tokens"], retry_after_s: int | None) -> None:
        super().__init__(message)
        self.unit = unit
        self.retry_after_s = retry_after_s


class GenerationFailed(BackendRefusal):
    """503, or an error event in a started stream: a stage died, disputed, or ran past its deadline."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who pays: the member behind an API key. `models` empty: every model of the pod; a limit of 0: none."""

    member: bytes
    member_name: str
    key_id: bytes
    delegation: bytes | None = None
    models: tuple[str, ...] = ()
    cap_microcredits: int = 0
    max_num_requests_per_minute: int = 0
    max_num_tokens_per_minute: int = 0

    @property
    def has_limits(self) -> bool:
        limits = (self.cap_microcredits, self.max_num_requests_per_minute, self.max_num_tokens_per_minute)
        return any(limits)


@dataclass(frozen=True, slots=True)
class RateLimit:
    """One limit of a key over a sliding minute. `reset_ms`: until all of it is free if nothing more comes."""

    unit: Literal["requests", "tokens"]
    limit: int
    remaining: int
    reset_ms: int


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A deployed model as a client sees it. `ready`: live nodes cover all its layers now."""

    name: str
    created_s: int
    owner: str
    vocab_size: int
    max_context_tokens: int
    ready: bool


class TextTokenizer(Protocol):
    """A model's tokenizer. Calls may come from any thread."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of the conversation up to where the assistant answers. `ValueError` or
        `jinja2.TemplateError`, with the template's own words, when it refuses the messages."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Bytes that are no complete UTF-8 come out as U+FFFD. No clean-up of spaces."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What this token alone adds to a text, which need not be whole characters; of a special one its
        name."""
        ...


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue. `request_id` is the `x-request-id` of the HTTP request, for logs."""

    model: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    request_id: str


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """One token. The last one of a generation has a finish reason other than NONE (eos included).

    `logprob` and `top_logprobs` (id, logprob; likeliest first) are there when the request asked for them.
    """

    token_id: int
    finish_reason: FinishReason
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What the ledger was told: the same integers as in the settled hold."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


class Generation(Protocol):
    """An open session. The gateway calls `tokens` once and `settle` exactly once, whatever happens."""

    @property
    def session(self) -> bytes: ...

    @property
    def route_text(self) -> str:
        """`name[0:10),name[10:20),…`"""
        ...

    @property
    def num_prompt_tokens(self) -> int: ...

    def tokens(self) -> AsyncGenerator[GeneratedToken, None]:
        """Until a finish reason; raises `GenerationFailed`. May be closed (or cancelled) at any token."""
        ...

    def delivered(self, num_output_tokens: int) -> None:
        """So many tokens have been written to the client; what is signed for the stages follows this."""
        ...

    async def settle(self, num_output_tokens: int) -> Usage:
        """Stop the generation if it runs, close the session and settle the hold at what was delivered.

        `num_output_tokens` counts from the first token and is at most what `tokens` yielded. 0 voids the
        hold unless more was signed for. Called in `finally`, also when the request was cancelled.
        """
        ...


class ModelState(StrEnum):
    READY = "ready"
    LOADING = "loading"
    NOT_COVERED = "not covered"


class RequestState(StrEnum):
    OPEN = "open"
    SETTLED = "settled"
    VOIDED = "voided"


@dataclass(frozen=True, slots=True)
class MemberRow:
    """One account. Removed members whose balance is not 0 stay in the list (role "removed")."""

    member: bytes
    name: str
    role: str
    balance_microcredits: int
    num_served_tokens: int
    num_consumed_tokens: int
    earned_microcredits: int
    spent_microcredits: int


@dataclass(frozen=True, slots=True)
class ShardRow:
    """Layers `[start_layer, end_layer)` of a model on one node. `loaded_per_mille` is 1000 when ready."""

    model_name: str
    start_layer: int
    end_layer: int
    loaded_per_mille: int
    num_active_sessions: int = 0


@dataclass(frozen=True, slots=True)
class NodeRow:
    """`note` says in one line why a node serves nothing (or ""); `device` like "cpu" or "cuda: RTX 4090"."""

    node: bytes
    name: str
    member_name: str
    device: str
    memory_bytes: int
    live: bool
    is_this_node: bool
    address: str
    shards: tuple[ShardRow, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class TokenTime:
    """Microseconds that one output token took at `place`: a stage, or head and links."""

    place: str
    compute_us: float
    queue_us: float
    hop_us: float
    total_us: float


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """What one node's stages of a model did for this node's requests since it started."""

    model_name: str
    node_name: str
    num_steps: int
    compute_s: float
    queue_s: float
    hop_s: float


@dataclass(frozen=True, slots=True)
class ModelRow:
    """`reason` says why a model is not covered, or what it waits for.

    `tokens_per_s` of one stream: the median of this node's recent requests; and what the route should reach
    by what its nodes measured. `token_times`: where a token of recent requests spent its time; the rest last.
    """

    name: str
    num_layers: int
    num_parameters: int
    dtype: str
    max_context_tokens: int
    state: ModelState
    loaded_per_mille: int = 1000
    reason: str = ""
    tokens_per_s: float | None = None
    predicted_tokens_per_s: float | None = None
    token_times: tuple[TokenTime, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestRow:
    """`tokens_per_s` is None when this node was not the head and does not know."""

    session: bytes
    time_ms: int
    member_name: str
    model_name: str
    route_text: str
    num_prompt_tokens: int
    num_output_tokens: int
    tokens_per_s: float | None
    price_microcredits: int
    state: RequestState


@dataclass(frozen=True, slots=True)
class LedgerState:
    """`num_violations` None: not audited yet. `digest` is equal on nodes with the same entries.

    `frozen`: names of nodes that signed two histories.
    """

    num_entries: int
    num_heads: int
    digest: bytes
    num_violations: int | None = None
    first_violation: str = ""
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TreasuryState:
    """The policy in force, and what the treasury took and paid over all time.

    `dividends_due_microcredits` are of periods that have not paid yet.
    """

    policy_name: str
    levy_per_mille: int
    dividend_per_mille: int
    dividend_period_s: int
    credit_line_microcredits: int
    levied_microcredits: int
    granted_microcredits: int
    dividends_paid_microcredits: int
    dividends_due_microcredits: int


@dataclass(frozen=True, slots=True)
class DashboardView:
    """All that the dashboard shows, newest request first."""

    pod_name: str
    node_name: str
    member_name: str
    members: tuple[MemberRow, ...]
    treasury_microcredits: int
    issuance_microcredits: int
    treasury: TreasuryState
    nodes: tuple[NodeRow, ...]
    models: tuple[ModelRow, ...]
    requests: tuple[RequestRow, ...]
    ledger: LedgerState
    stage_seconds: tuple[StageSeconds, ...] = ()

    @property
    def sum_microcredits(self) -> int:
        """Over the rows that are shown; 0 when the books balance."""
        members = sum(row.balance_microcredits for row in self.members)
        return members + self.treasury_microcredits + self.issuance_microcredits


class Backend(Protocol):
    """The node behind the gateway. Called on the event loop; nothing here may block it."""

    async def authenticate(self, bearer: str) -> Caller:
        """Raises `KeyRefused`. Offline: roster and signature only."""
        ...

    def rate_limits(self, caller: Caller) -> Sequence[RateLimit]:
        """The limits per minute of the caller's key, as they stand now; none if it has none."""
        ...

    def may_view(self, member: bytes, key_id: bytes) -> bool:
        """Does a login made with this key still stand (member not removed, key not revoked or expired)?"""
        ...

    def models(self) -> Sequence[ModelCard]: ...

    async def tokenizer(self, model: str) -> TextTokenizer:
        """Of a model in `models()`. Raises `NoRoute` when its files are not on this node yet."""
        ...

    async def generate(self, caller: Caller, request: GenerationRequest) -> Generation:
        """Open a hold, choose a route, open the session. Raises any of the refusals above, and then leaves
        nothing open. If cancelled, likewise."""
        ...

    def dashboard(self) -> DashboardView: ...

    def changes(self) -> AsyncGenerator[None, None]:
        """Yields after something in `dashboard()` changed; several changes may come as one."""
        ...
