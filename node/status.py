"""What a node says of itself to the others: the body of its signed advert, in canonical CBOR.

Knows the words and their limits; knows neither how adverts travel nor what placement makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from node.speed import Speed
from pod.canonical import decode, encode

STATUS_VERSION = 2
MAX_STATUS_BYTES = 64 * 1024
MAX_NUM_SHARDS = 256
MAX_NUM_SPEEDS = 64
MAX_RTT_US = 60_000_000
MAX_TEXT_CHARACTERS = 256


class StatusError(ValueError):
    """The bytes are no status of this version."""


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """One shard of `model`: layers `[start_layer, end_layer)`, ready or `loaded_per_mille` of the way."""

    model: bytes
    start_layer: int
    end_layer: int
    loaded_per_mille: int = 1000
    microseconds_per_layer: int = 0
    num_kv_tokens: int = 0

    @property
    def ready(self) -> bool:
        return self.loaded_per_mille >= 1000


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """`data_address` and `api_url` are what other machines dial; empty when this node serves nothing.

    `starting`: it means to serve, but its engine or its look at the model files is not ready yet. `speeds` of
    models whose layers it has loaded since it started, dropped ones too; `link_rtt_us` to the other nodes, 0
    if unknown.
    """

    serving: bool
    starting: bool
    device: str
    memory_bytes: int
    bytes_per_second: int
    data_address: str
    api_url: str
    software: str
    shards: tuple[ShardStatus, ...] = ()
    models_available: tuple[bytes, ...] = ()
    problems: tuple[tuple[bytes, str], ...] = ()
    speeds: tuple[tuple[bytes, Speed], ...] = ()
    link_rtt_us: int = 0

    def models_judged(self) -> frozenset[bytes]:
        """The models of which it has said that it has the files, or why it does not serve them."""
        return frozenset(self.models_available) | {model for model, _ in self.problems}

    def encode(self) -> bytes:
        shards = [
            [
                s.model,
                s.start_layer,
                s.end_layer,
                s.loaded_per_mille,
                s.microseconds_per_layer,
                s.num_kv_tokens,
            ]
            for s in self.shards
        ]
        return encode(
            [
                STATUS_VERSION,
                self.serving,
                self.starting,
                self.device,
                self.memory_bytes,
                self.bytes_per_second,
                self.data_address,
                self.api_url,
                self.software,
                shards,
                list(self.models_available),
                [[model, reason] for model, reason in self.problems],
                [
                    [model, list(speed.decode_us), list(speed.prefill_us), list(speed.head_us)]
                    for model, speed in self.speeds
                ],
                self.link_rtt_us,
            ]
        )

    @classmethod
    def decode(cls, data: bytes) -> NodeStatus:
        """Raises StatusError for anything a node of this version would not have written."""
        try:
            fields = _items(decode(data, MAX_STATUS_BYTES))
            version, serving, starting, device, memory, speed, *rest = fields
            data_address, api_url, software, shards, models, problems, speeds, link_rtt = rest
            status = cls(
                serving=_boolean(serving),
                starting=_boolean(starting),
                device=_text(device),
                memory_bytes=_count(memory),
                bytes_per_second=_count(speed),
                data_address=_text(data_address),
                api_url=_text(api_url),
                software=_text(software),
                shards=tuple(_shard(*item) for item in _items(shards)),
                models_available=tuple(_model(item) for item in _items(models)),
                problems=tuple((_model(model), _text(reason)) for model, reason in _items(problems)),
                speeds=_speeds(speeds),
                link_rtt_us=_rtt(link_rtt),
            )
        except (ValueError, TypeError) as error:
            raise StatusError(f"no status: {error}") from None
        if version != STATUS_VERSION or status.encode() != data:
            raise StatusError("a status of another version, or not in canonical form")
        return status


def _shard(
    model: object, start: object, end: object, loaded: object, speed: object, kv: object
) -> ShardStatus:
    shard = ShardStatus(_model(model), _count(start), _count(end), _count(loaded), _count(speed), _count(kv))
    if shard.start_layer >= shard.end_layer or shard.loaded_per_mille > 1000:
        raise ValueError("an impossible shard")
    return shard


def _speeds(value: object) -> tuple[tuple[bytes, Speed], ...]:
    speeds = tuple(
        (_model(model), Speed(_times(decode), _times(prefill), _times(head)))
        for model, decode, prefill, head in _items(value)
    )
    if len(speeds) > MAX_NUM_SPEEDS or len(dict(speeds)) != len(speeds):
        raise ValueError("too many speeds, or two of one model")
    return speeds


def _times(value: object) -> tuple[int, ...]:
    return tuple(_count(time_us) for time_us in _items(value))


def _rtt(value: object) -> int:
    rtt_us = _count(value)
    if rtt_us > MAX_RTT_US:
        raise ValueError("an impossible round trip")
    return rtt_us


def _items(value: object) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_NUM_SHARDS:
        raise ValueError("not a list within its limit")
    return value


def _model(value: object) -> bytes:
    if not isinstance(value, bytes) or len(value) != 32:
        raise ValueError("not a model id")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError("not a count")
    return value


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("not a boolean")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT_CHARACTERS:
        raise ValueError("not a text within its limit")
    return value
