"""The frame decoder against 100,000 inputs that want to harm it: it refuses or understands, in little memory.

The inputs come from a seeded generator, so that a failure can be had again: random bytes, valid frames with
bytes changed, cut, doubled or spliced, lengths that claim anything, and CBOR of every shape.
"""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import cbor2

from node.links.codec import PREFIX_BYTES, WIRE_VERSION, FrameError, decode, encode, parse_prefix
from node.links.frames import (
    CloseSession,
    Dtype,
    ErrorCode,
    FinishReason,
    Frame,
    HiddenBatch,
    HiddenItem,
    Lane,
    Ping,
    Pong,
    ReceiptSigned,
    Sampling,
    SessionError,
    SessionOpened,
    SignReceipt,
    StageTiming,
    StartSession,
    TokenBatch,
    TokenItem,
)
from node.links.limits import LinkLimits
from node.links.port import LinkDown
from node.links.wires import Receiver
from tests.links.ends import SESSION, open_session, rows_frame

NUM_INPUTS = 100_000
NUM_STREAMS = 3000
MAX_PEAK_BYTES = 4 << 20
MAX_ONE_S = 2.0
OTHER = b"o" * 16

_SAMPLING = Sampling(min_p=0.1, logit_bias=((5, 2.0), (9, -4.5)), num_top_logprobs=3, eos_token_ids=(1, 2))
VALID: list[Frame] = [
    rows_frame(3, 64),
    HiddenBatch((HiddenItem(SESSION, 9, 3, (4, 5)), HiddenItem(OTHER, 1, 1)), Dtype.BFLOAT16, 5, bytes(40)),
    HiddenBatch((HiddenItem(SESSION, 9, 2),), Dtype.INT8, 65, bytes(2 * 69)),
    TokenBatch((TokenItem(SESSION, 4, 17, FinishReason.NONE),)),
    TokenBatch(
        (
            TokenItem(SESSION, 4, 17, FinishReason.NONE, -0.5, ((17, -0.5), (3, -1.5))),
            TokenItem(OTHER, 5, 1, FinishReason.STOP, -2.0),
        )
    ),
    open_session(bytes(32)),
    replace(
        open_session(bytes(32)),
        sampling=_SAMPLING,
        num_prompt_tokens=40,
        prompt_ids=array("I", range(40)),
        prefix_hashes=(SESSION, OTHER),
        max_num_draft_tokens=7,
    ),
    SessionOpened(SESSION, 2, 32),
    StartSession(SESSION, 16),
    CloseSession(SESSION),
    SessionError(SESSION, 1, ErrorCode.PREEMPTED, "no room"),
    SignReceipt(SESSION, b"r" * 60),
    ReceiptSigned(SESSION, b"r" * 60),
    StageTiming(SESSION, 1, 2, 3, 4, 5),
    Ping(7),
    Pong(2**64 - 1),
]
CORPUS = [b"".join(encode(frame)) for frame in VALID]
ODD_NUMBERS = (0, 1, 2, 15, 16, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)


def framed(number: int, header: bytes, payload: bytes) -> bytes:
    return struct.pack("!BBII", WIRE_VERSION, number, len(header), len(payload)) + header + payload


def noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(300))


def noise_in_a_frame(rng: random.Random) -> bytes:
    return framed(rng.randrange(14), rng.randbytes(rng.randrange(120)), rng.randbytes(rng.randrange(40)))


def changed(rng: random.Random) -> bytes:
    raw = bytearray(rng.choice(CORPUS))
    for _ in range(rng.randrange(1, 4)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


def cut(rng: random.Random) -> bytes:
    raw = rng.choice(CORPUS)
    return raw[: rng.randrange(len(raw))]


def spliced(rng: random.Random) -> bytes:
    one, other = rng.choice(CORPUS), rng.choice(CORPUS)
    return one[: rng.randrange(len(one) + 1)] + other[rng.randrange(len(other)) :]


def with_lengths(rng: random.Random) -> bytes:
    """A valid frame that claims to be any size, as prefix and fields have it."""
    raw = bytearray(rng.choice(CORPUS))
    place = rng.choice((2, 6, rng.randrange(2, len(raw) - 3)))
    struct.pack_into("!I", raw, place, rng.choice((*ODD_NUMBERS, rng.randrange(2**32))))
    return bytes(raw)


def of_another_type(rng: random.Random) -> bytes:
    raw = bytearray(rng.choice(CORPUS))
    raw[1] = rng.randrange(14)
    return bytes(raw)


def refitted(rng: random.Random) -> bytes:
    """Bytes put in or taken out of header and payload, with lengths that agree."""
    raw = rng.choice(CORPUS)
    _, number, header_bytes, _ = struct.unpack("!BBII", raw[:PREFIX_BYTES])
    header = bytearray(raw[PREFIX_BYTES : PREFIX_BYTES + header_bytes])
    payload = raw[PREFIX_BYTES + header_bytes :]
    place = rng.randrange(len(header))
    if rng.random() < 0.5:
        header[place:place] = rng.randbytes(rng.randrange(1, 9))
    else:
        del header[place : place + rng.randrange(1, 9)]
    return framed(number, bytes(header), payload[: rng.randrange(len(payload) + 1)])


def any_cbor(rng: random.Random) -> bytes:
    return framed(rng.randrange(1, 13), cbor2.dumps(_value(rng, 5)), b"")


def _value(rng: random.Random, depth: int) -> object:
    match rng.randrange(9 if depth else 6):
        case 0:
            return rng.choice(ODD_NUMBERS) * rng.choice((1, -1, 2**40))
        case 1:
            return rng.randbytes(rng.choice((0, 16, 32, 33)))
        case 2:
            return rng.choice((1.5, float("nan"), float("inf"), -0.0))
        case 3:
            return rng.choice((True, False, None, cbor2.undefined))
        case 4:
            return "x" * rng.randrange(5)
        case 5:
            return cbor2.CBORTag(rng.randrange(300), rng.choice(("a", 1, b"z")))
        case 6:
            return {rng.randrange(5): _value(rng, depth - 1)}
        case _:
            return [_value(rng, depth - 1) for _ in range(rng.randrange(7))]


def bombs(rng: random.Random) -> bytes:
    """Small CBOR that claims to be deep or long."""
    claim = struct.pack("!Q", rng.choice((2**16, 2**32, 2**56, 2**63 - 1)))
    header = rng.choice(
        (
            bytes([rng.choice((0x81, 0xA1, 0xC1, 0xD8, 0x9F, 0xBF))]) * rng.randrange(1, 4000),
            bytes([rng.choice((0x5B, 0x7B, 0x9B, 0xBB, 0xDB, 0x1B))]) + claim,
            b"\x82\x50" + SESSION + b"\x9b" + claim,
        )
    )
    return framed(rng.randrange(1, 13), header, b"")


KINDS: tuple[Callable[[random.Random], bytes], ...] = (
    noise,
    noise_in_a_frame,
    changed,
    cut,
    spliced,
    with_lengths,
    of_another_type,
    refitted,
    any_cbor,
    bombs,
)


def understood(raw: bytes, lane: Lane) -> Frame | None:
    """As a link reads: the prefix first, then what it announces, if that much has come."""
    try:
        prefix = parse_prefix(raw[:PREFIX_BYTES], lane)
        end = PREFIX_BYTES + prefix.header_bytes
        return decode(prefix, raw[PREFIX_BYTES:end], raw[end : end + prefix.payload_bytes])
    except FrameError:
        return None


def test_a_hundred_thousand_inputs_are_refused_or_understood() -> None:
    rng = random.Random(20261123)
    num_understood: Counter[str] = Counter()
    longest_s = 0.0
    tracemalloc.start()
    try:
        for number in range(NUM_INPUTS):
            make = KINDS[number % len(KINDS)]
            raw = make(rng)
            start_s = time.thread_time()
            frame = understood(raw, Lane(number & 1))
            longest_s = max(longest_s, time.thread_time() - start_s)
            if frame is not None:
                num_understood[make.__name__] += 1
                said = b"".join(encode(frame))
                assert raw[: len(said)] == said, raw
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < MAX_PEAK_BYTES
    assert longest_s < MAX_ONE_S
    # The mutations are not so wild that nothing but the first check is met, nor so tame that all passes.
    assert 500 < num_understood["changed"] < NUM_INPUTS / len(KINDS) / 2
    assert num_understood["bombs"] == num_understood["noise"] == 0


class Plain:
    """Stands in for the TLS socket: these bytes in pieces of any size, then the end."""

    def __init__(self, raw: bytes, rng: random.Random) -> None:
        self.raw = self
        self._left = memoryview(raw)
        self._rng = rng
        self.written = b""

    def settimeout(self, _: float | None) -> None:
        pass

    def recv_into(self, target: memoryview) -> int:
        size = min(len(target), len(self._left), self._rng.choice((1, 7, 60, 16 << 10)))
        target[:size] = self._left[:size]
        self._left = self._left[size:]
        return size

    def write(self, raw: bytes) -> bool:
        self.written += raw
        return True


ALL_TYPES = frozenset(map(type, VALID))
ROOMY = LinkLimits(max_num_held_bytes=dict.fromkeys(Lane, 64 << 20))


def read_stream(raw: bytes, rng: random.Random) -> list[Frame]:
    receiver = Receiver(Plain(raw, rng), Lane.DECODE, ROOMY, ALL_TYPES)  # type: ignore[arg-type]
    frames: list[Frame] = []
    try:
        while True:
            frames.append(receiver.read()[0])
    except (FrameError, LinkDown):
        return frames


def test_frames_are_found_in_a_stream_however_it_is_cut() -> None:
    rng = random.Random(5)
    expected = [frame for frame in VALID if not isinstance(frame, Ping)]
    for _ in range(200):
        assert read_stream(b"".join(CORPUS), rng) == expected


def test_a_stream_that_goes_wrong_ends_with_the_frames_before_it() -> None:
    rng = random.Random(7)
    tracemalloc.start()
    try:
        for number in range(NUM_STREAMS):
            good = [rng.randrange(len(VALID)) for _ in range(rng.randrange(4))]
            bad = KINDS[number % len(KINDS)](rng)
            frames = read_stream(b"".join(CORPUS[place] for place in good) + bad, rng)
            expected = [VALID[place] for place in good if not isinstance(VALID[place], Ping)]
            assert frames[: len(expected)] == expected
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # One payload that was announced within the limits of the lane and never came.
    assert peak_bytes < MAX_PEAK_BYTES + (16 << 20)
