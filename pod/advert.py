"""What a node says of itself: where it can be dialled and, opaque here, what it offers. Signed by the node,
newest per node, only of nodes in the roster; a Replicated channel of the gossip.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from pod.canonical import (
    DecodeError,
    Id,
    Length,
    Signature,
    decode,
    decode_record,
    encode,
    encode_record,
)
from pod.gossip import MAX_PIECE_BYTES
from pod.identity import KeyPair, verify

VERSION = 1
MAX_ADVERT_BYTES = 64 * 1024
_NO_SIGNATURE = bytes(64)
_KNOWN = struct.Struct(">32sQ")


@dataclass(frozen=True, slots=True)
class NodeAdvert:
    """The higher sequence is the newer one. `run` is random per start of the node."""

    version: int
    pod: Id
    node: Id
    sequence: int
    time_ms: int
    run: Annotated[bytes, Length(8, 8)]
    addresses: Annotated[tuple[Annotated[str, Length(1, 256)], ...], Length(0, 32)]
    body: Annotated[bytes, Length(0, 32 * 1024)]
    signature: Signature


def decode_advert(raw: bytes) -> NodeAdvert:
    """Raises DecodeError unless these are the canonical bytes of an advert its node signed."""
    advert = decode_record(NodeAdvert, raw, MAX_ADVERT_BYTES)
    if advert.version != VERSION:
        raise DecodeError(f"an advert of version {advert.version}")
    if not verify(advert.node, _signed_bytes(advert), advert.signature):
        raise DecodeError("the advert's signature does not match")
    return advert


class AdvertBook:
    """The newest advert of every node. `on_change` is called after others' adverts came in."""

    name = "adverts"

    def __init__(
        self,
        pod: bytes,
        key: KeyPair,
        run: bytes,
        is_node: Callable[[bytes], bool],
        clock_ms: Callable[[], int],
    ) -> None:
        self._pod = pod
        self._key = key
        self._run = run
        self._is_node = is_node
        self._clock_ms = clock_ms
        self._adverts: dict[bytes, NodeAdvert] = {}
        self._num_foreign_own = 0
        self.on_change: Callable[[], None] = lambda: None
        self.on_duplicate: Callable[[], None] = lambda: None

    def all(self) -> Mapping[bytes, NodeAdvert]:
        return dict(self._adverts)

    def publish(self, addresses: tuple[str, ...], body: bytes) -> NodeAdvert:
        now_ms = self._clock_ms()
        known = self._adverts.get(self._key.public)
        sequence = max(now_ms, known.sequence + 1 if known else 0)
        unsigned = NodeAdvert(
            VERSION,
            self._pod,
            self._key.public,
            sequence,
            now_ms,
            self._run,
            addresses,
            body,
            _NO_SIGNATURE,
        )
        advert = replace(unsigned, signature=self._key.sign(_signed_bytes(unsigned)))
        self._adverts[advert.node] = decode_advert(encode_record(advert))
        return advert

    def forget_strangers(self) -> None:
        self._adverts = {node: advert for node, advert in self._adverts.items() if self._is_node(node)}

    def digest(self) -> bytes:
        return hashlib.sha256(self.summary()).digest()

    def summary(self) -> bytes:
        return b"".join(_KNOWN.pack(node, advert.sequence) for node, advert in sorted(self._adverts.items()))

    def missing(self, summary: bytes) -> tuple[bytes, bool]:
        known = dict(_KNOWN.iter_unpack(summary[: len(summary) // _KNOWN.size * _KNOWN.size]))
        newer = [one for one in self._adverts.values() if one.sequence > known.get(one.node, -1)]
        piece: list[bytes] = []
        num_bytes = 0
        for advert in newer:
            raw = encode_record(advert)
            if num_bytes + len(raw) > MAX_PIECE_BYTES:
                return encode(piece), True
            piece.append(raw)
            num_bytes += len(raw)
        return encode(piece), False

    async def ingest(self, peer: bytes, payload: bytes) -> int:
        pieces = decode(payload, 2 * MAX_PIECE_BYTES)
        if not isinstance(pieces, list) or not all(isinstance(raw, bytes) for raw in pieces):
            raise DecodeError("not a list of adverts")
        num_new = sum(self._take(decode_advert(raw)) for raw in pieces)
        if num_new:
            self.on_change()
        return num_new

    def _take(self, advert: NodeAdvert) -> bool:
        known = self._adverts.get(advert.node)
        if advert.pod != self._pod or not self._is_node(advert.node):
            return False
        if known is not None and advert.sequence <= known.sequence:
            return False
        if advert.node == self._key.public:
            return self._answer_own_name(advert)
        self._adverts[advert.node] = advert
        return True

    def _answer_own_name(self, advert: NodeAdvert) -> bool:
        """An advert of this node from another run: an earlier one of its own, if it stays at one.

        Each is answered with a newer one of this run; if that is answered again, somebody else is running
        with a copy of this node's keys at this moment.
        """
        own = self._adverts.get(self._key.public)
        self._adverts[advert.node] = advert
        if own is not None and own.run == self._run:
            self.publish(own.addresses, own.body)
        self._num_foreign_own += 1
        if self._num_foreign_own > 1:
            self.on_duplicate()
        return True


def _signed_bytes(advert: NodeAdvert) -> bytes:
    return b"gpu-pod node advert\0" + encode_record(replace(advert, signature=_NO_SIGNATURE))
