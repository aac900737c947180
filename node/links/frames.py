"""The frames of the data plane: what a head and the stages of a route say to each other.

Only the words are here; `codec.py` turns them into bytes. A frame is sent once and never acknowledged:
prompt ids, route and sampling travel in `OpenSession`, after that only positions, hidden states and token
ids move. All ids are raw bytes: a node is its 32-byte Ed25519 public key, a session 16 random bytes, a
model the 32-byte digest of its package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

NODE_ID_BYTES = 32
SESSION_ID_BYTES = 16
MODEL_ID_BYTES = 32
PREFIX_HASH_BYTES = 16
PREFIX_BLOCK_TOKENS = 16
SCALE_GROUP = 64
MAX_NUM_DRAFT_TOKENS = 15
MAX_NUM_TOP_LOGPROBS = 20
MAX_NUM_LOGIT_BIASES = 1024
MAX_AUTHORIZATION_BYTES = 1024


class Lane(IntEnum):
    """Decode steps never wait behind prefill chunks: each lane is a connection of its own."""

    DECODE = 0
    BULK = 1


class Dtype(IntEnum):
    """How a row of hidden states travels.

    An INT8 row is `hidden_size` int8 codes, then a little-endian float16 scale for each `SCALE_GROUP` of
    them (the last group may be shorter): value = code * scale.
    """

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    INT8 = 3


class FinishReason(IntEnum):
    """Why the last stage stopped by itself. NONE: the session goes on."""

    NONE = 0
    STOP = 1
    LENGTH = 2


class ErrorCode(IntEnum):
    """Why a stage refuses or ends a session."""

    INTERNAL = 0
    UNKNOWN_SHARD = 1
    NO_KV_ROOM = 2
    UNKNOWN_SESSION = 3
    NEXT_HOP_UNREACHABLE = 4
    UNSIGNED_LIMIT = 5
    DISPUTED_RECEIPT = 6
    DEADLINE = 7
    BAD_FRAME = 8
    SHUTTING_DOWN = 9
    PREEMPTED = 10
    KV_BUDGET_TOO_SMALL = 11


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a route: layers `[start_layer, end_layer)` on `node`, at `data_address` (host:port)."""

    node: bytes
    data_address: str
    start_layer: int
    end_layer: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the last stage picks a token. temperature 0 is greedy; the defaults of the others switch them off.

    `logit_bias` pairs token ids with what is added to their logits (at most `MAX_NUM_LOGIT_BIASES`).
    `num_top_logprobs` -1: no logprobs; from 0 to `MAX_NUM_TOP_LOGPROBS`: the chosen token's and those of
    that many of the likeliest.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_num_output_tokens: int = 16
    min_num_output_tokens: int = 0
    ignore_eos: bool = False
    eos_token_ids: tuple[int, ...] = ()
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_top_logprobs: int = -1

    @property
    def has_penalties(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty) or self.repetition_penalty != 1

    def needs_prompt(self, num_output_tokens_before: int) -> bool:
        """Whether the last stage, which knows only what it has picked itself, must be told the rest."""
        return self.repetition_penalty != 1 or (self.has_penalties and num_output_tokens_before > 0)


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Head -> each stage, once. `prompt_ids` goes to the first stage, and to the last if sampling needs it.

    `num_output_tokens_before` counts the tokens at the end of the prompt that are earlier output (a replay
    after a failure), so that sampling positions and limits continue where they were. `prefix_hashes` names
    the full blocks of `PREFIX_BLOCK_TOKENS` prompt tokens, from the first on, for stages that keep blocks.
    `max_num_draft_tokens` (at most `MAX_NUM_DRAFT_TOKENS`) is how many rows per step may be guesses.
    `authorization` (at most `MAX_AUTHORIZATION_BYTES`) is the payer's signature under the hold; empty when
    the head's own member pays.
    """

    session: bytes
    model: bytes
    route: tuple[Stage, ...]
    stage_index: int
    head: bytes
    payer: bytes
    key_id: bytes
    hold_microcredits: int
    num_prompt_tokens: int
    sampling: Sampling
    deadline_ms: int
    rate_card_version: int
    num_output_tokens_before: int = 0
    prompt_ids: Sequence[int] = ()
    prefix_hashes: tuple[bytes, ...] = ()
    max_num_draft_tokens: int = 0
    authorization: bytes = b""


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """Stage -> head: KV room is reserved and the next hop is connected.

    The stage has the KV of `num_cached_tokens` prompt tokens already: a multiple of `PREFIX_BLOCK_TOKENS`.
    """

    session: bytes
    stage_index: int
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StartSession:
    """Head -> first stage, when every stage has opened: begin after what all stages have already."""

    session: bytes
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CloseSession:
    """Head -> each stage: done, cancelled or given up; KV is freed, the session is forgotten."""

    session: bytes


@dataclass(frozen=True, slots=True)
class SessionError:
    """Stage -> head: this session ends here. `message` is one line for people."""

    session: bytes
    stage_index: int
    code: ErrorCode
    message: str


@dataclass(frozen=True, slots=True)
class HiddenItem:
    """One session's share of a `HiddenBatch`: `num_tokens` rows whose first token stands at `position`.

    The last `len(draft_ids)` rows are of guessed tokens, which have these ids.
    """

    session: bytes
    position: int
    num_tokens: int
    draft_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class HiddenBatch:
    """Stage -> next stage, one per step and next hop: rows of all sessions, in the order of `items`.

    `rows` is `[sum(num_tokens), hidden_size]` of `dtype`, row-major, little-endian, each row on its own.
    """

    items: tuple[HiddenItem, ...]
    dtype: Dtype
    hidden_size: int
    rows: bytes | memoryview = field(repr=False)


@dataclass(frozen=True, slots=True)
class TokenItem:
    """One sampled token. `position` is its place in the whole sequence (prompt included, from 0).

    `logprob` is the token's own, `top_logprobs` (id, logprob) of the likeliest; only heads are told them.
    """

    session: bytes
    position: int
    token_id: int
    finish_reason: FinishReason
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Last stage -> first stage and, at the same time, last stage -> head.

    Several items of one session, at rising positions, are guesses that came true.
    """

    items: tuple[TokenItem, ...]


@dataclass(frozen=True, slots=True)
class Malformed:
    """Never sent: what a link hands over in place of a batch that names its sessions and cannot be."""

    sessions: tuple[bytes, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class SignReceipt:
    """Head -> stage: a cumulative receipt signed by the head (encoded by `ledger.receipt`)."""

    session: bytes
    receipt: bytes


@dataclass(frozen=True, slots=True)
class ReceiptSigned:
    """Stage -> head: the same receipt, co-signed after the stage compared it with its own count."""

    session: bytes
    receipt: bytes


@dataclass(frozen=True, slots=True)
class StageTiming:
    """Stage -> head at the end of a session: where the time went.

    `link_us` is half the last round trip to the next hop that was measured; 0 if none was.
    """

    session: bytes
    stage_index: int
    num_steps: int
    compute_us: int
    queue_us: int
    link_us: int = 0


@dataclass(frozen=True, slots=True)
class Ping:
    """Liveness on the data plane; answered by `Pong` from the receiving thread, whatever torch is doing."""

    nonce: int


@dataclass(frozen=True, slots=True)
class Pong:
    nonce: int


Frame = (
    OpenSession
    | SessionOpened
    | StartSession
    | CloseSession
    | SessionError
    | HiddenBatch
    | TokenBatch
    | Malformed
    | SignReceipt
    | ReceiptSigned
    | StageTiming
    | Ping
    | Pong
)
