"""What the node process and its engine process say to each other over a socket pair, and its bytes.

One message is a u32 length and a CBOR array: a number for the type, then the fields, checked against the
dataclass when read. Commands go down, answers carry their `request`, events come up by themselves.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass

import cbor2

from node.engine.events import ReceiptHeld, SessionEnded, WorkDisputed
from node.speed import Speed

LENGTH_BYTES = 4
MAX_NUM_RATE_CARDS = 4
MAX_MESSAGE_BYTES = 16 << 20
MAX_NUM_STANDINGS = 65_536


class MessageError(Exception):
    """The bytes are no message of ours."""


@dataclass(frozen=True, slots=True)
class Configure:
    """The first command. Empty `memory_bytes` and `num_threads` (0): the engine decides. `compile_dir` keeps
    compiled layers; empty: none are compiled. `hidden_bits`: how hidden states travel to the next stage, 16
    (as they are), 8, or 0 for 8 where the way is long. `max_num_sessions`: that run at once; 0: the engine's
    own limit.
    """

    node_key_path: str
    pod: bytes
    data_listen: str
    device: str
    memory_bytes: int
    num_threads: int
    compile_dir: str
    hidden_bits: int
    max_num_sessions: int


@dataclass(frozen=True, slots=True)
class LoadShard:
    request: int
    model_dir: str
    weights: tuple[str, ...]
    start_layer: int
    end_layer: int
    dtype: str


@dataclass(frozen=True, slots=True)
class DropShard:
    request: int
    model: bytes
    start_layer: int
    end_layer: int


@dataclass(frozen=True, slots=True)
class SetTrust:
    request: int
    certificates: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class SetRateCard:
    """The engine keeps the last `MAX_NUM_RATE_CARDS` it was told; sessions keep the one they began with."""

    request: int
    rate_card: bytes


@dataclass(frozen=True, slots=True)
class MemberStanding:
    """What a member weighs in the queue, and which nodes are its own."""

    member: bytes
    weight_per_mille: int
    is_past_credit_line: bool
    nodes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class SetStandings:
    """All members of the pod, or as many as `MAX_NUM_STANDINGS`."""

    request: int
    standings: tuple[MemberStanding, ...]


@dataclass(frozen=True, slots=True)
class GetStats:
    request: int


@dataclass(frozen=True, slots=True)
class Stop:
    request: int


@dataclass(frozen=True, slots=True)
class EngineReady:
    """`bytes_per_second` is how fast the device was measured to read memory."""

    data_address: str
    device: str
    memory_bytes: int
    bytes_per_second: int
    num_threads: int

    @property
    def data_port(self) -> int:
        return int(self.data_address.rpartition(":")[2])


@dataclass(frozen=True, slots=True)
class Done:
    request: int


@dataclass(frozen=True, slots=True)
class Failed:
    """`message` is one line for people. Request 0: the engine could not start."""

    request: int
    message: str


@dataclass(frozen=True, slots=True)
class LoadProgress:
    request: int
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True)
class ShardReady:
    request: int
    model: bytes
    start_layer: int
    end_layer: int
    dtype: str
    num_parameters: int
    num_weight_bytes: int
    kv_capacity_tokens: int
    speed: Speed


@dataclass(frozen=True, slots=True)
class ShardStats:
    model: bytes
    start_layer: int
    end_layer: int
    num_sessions: int
    free_kv_tokens: int
    kv_capacity_tokens: int
    speed: Speed


@dataclass(frozen=True, slots=True)
class EngineStats:
    request: int
    shards: tuple[ShardStats, ...]
    used_memory_bytes: int


Command = LoadShard | DropShard | SetTrust | SetRateCard | SetStandings | GetStats | Stop
Reply = Done | Failed | ShardReady | EngineStats
Event = LoadProgress | ReceiptHeld | SessionEnded | WorkDisputed
Message = Configure | EngineReady | Command | Reply | Event

# The number on the wire is the place in this tuple; both processes are always the same version.
_TYPES: tuple[type[Message], ...] = typing.get_args(Message)
_HINTS = {kind: typing.get_type_hints(kind) for kind in (*_TYPES, ShardStats, MemberStanding, Speed)}


def encode(message: Message) -> bytes:
    """With its length in front. Raises MessageError when it is too long."""
    raw = cbor2.dumps([_TYPES.index(type(message)), *_plain_fields(message)])
    if len(raw) > MAX_MESSAGE_BYTES:
        raise MessageError(f"a message of {len(raw)} bytes")
    return len(raw).to_bytes(LENGTH_BYTES, "big") + raw


def read_length(prefix: bytes) -> int:
    length = int.from_bytes(prefix, "big")
    if length > MAX_MESSAGE_BYTES:
        raise MessageError(f"a message of {length} bytes")
    return length


def decode(raw: bytes) -> Message:
    try:
        kind, *values = cbor2.loads(raw)
        message: Message = _build(_TYPES[kind], values)
        return message
    except (cbor2.CBORDecodeError, ValueError, TypeError, IndexError, RecursionError) as error:
        raise MessageError(f"not a message ({error})") from error


Built = typing.TypeVar("Built")


def _build(kind: type[Built], values: list[object]) -> Built:
    hints = _HINTS[kind]  # type: ignore[index]
    if len(values) != len(hints):
        raise ValueError(f"{kind.__name__} has {len(hints)} fields")
    return kind(*(_checked(value, hint) for value, hint in zip(values, hints.values(), strict=True)))


def _checked(value: object, hint: object) -> object:
    if isinstance(hint, types.GenericAlias):
        if not isinstance(value, list):
            raise ValueError("not a list")
        return tuple(_checked(item, typing.get_args(hint)[0]) for item in value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, list):
        return _build(hint, value)
    if type(value) is not hint:
        raise ValueError(f"a {type(value).__name__} where {hint} belongs")
    return value


def _plain_fields(message: object) -> list[object]:
    return [_plain(getattr(message, field.name)) for field in dataclasses.fields(message)]  # type: ignore[arg-type]


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return _plain_fields(value) if dataclasses.is_dataclass(value) else value
