"""The codec: every frame survives the way to bytes and back, and no bytes do harm."""

from __future__ import annotations

import struct
import tracemalloc
from array import array
from dataclasses import replace

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.links.batches import LEAST_LOGPROB, MAX_BATCH_HEADER_BYTES, MAX_NUM_ITEMS, num_row_bytes
from node.links.codec import (
    MAX_HEADER_BYTES,
    MAX_NUM_MESSAGE_CHARS,
    MAX_ROWS_BYTES,
    PREFIX_BYTES,
    WIRE_VERSION,
    FrameError,
    decode,
    encode,
    parse_prefix,
)
from node.links.frames import (
    CloseSession,
    Dtype,
    ErrorCode,
    FinishReason,
    Frame,
    HiddenBatch,
    HiddenItem,
    Lane,
    OpenSession,
    Ping,
    Pong,
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
from node.links.openings import MAX_NUM_PREFIX_HASHES, MAX_NUM_PROMPT_IDS, MAX_OPENING_PAYLOAD_BYTES
from tests.links.ends import SESSION, open_session, rows_frame

u32 = st.integers(0, 2**32 - 1)
u63 = st.integers(0, 2**63 - 1)
real = st.floats(allow_nan=False, allow_infinity=False)
session = st.binary(min_size=16, max_size=16)
node = st.binary(min_size=32, max_size=32)
stage_index = st.integers(0, 255)
receipt = st.binary(max_size=300)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
sampling = st.builds(
    Sampling,
    real,
    real,
    u32,
    st.integers(-(2**63), 2**64 - 1),
    u32,
    u32,
    st.booleans(),
    st.lists(u32, max_size=8).map(tuple),
    st.floats(0, 1),
    st.floats(-100, 100),
    st.floats(-100, 100),
    st.floats(0.01, 100),
    st.lists(st.tuples(u32, st.floats(-1000, 1000)), max_size=4).map(tuple),
    st.integers(-1, 20),
)
blocks = st.integers(0, 2**28 - 1).map(lambda number: 16 * number)


@st.composite
def hidden_items(draw: st.DrawFn) -> HiddenItem:
    num_tokens = draw(st.integers(1, 5))
    draft_ids = draw(st.lists(u32, max_size=num_tokens))
    return HiddenItem(draw(session), draw(u32), num_tokens, tuple(draft_ids))


@st.composite
def hidden_batches(draw: st.DrawFn) -> HiddenBatch:
    items = draw(st.lists(hidden_items(), min_size=1, max_size=6))
    dtype = draw(st.sampled_from(Dtype))
    hidden_size = draw(st.integers(1, 16) | st.integers(60, 70))
    num_bytes = sum(item.num_tokens for item in items) * num_row_bytes(dtype, hidden_size)
    return HiddenBatch(tuple(items), dtype, hidden_size, draw(st.binary(min_size=1, max_size=1)) * num_bytes)


@st.composite
def token_items(draw: st.DrawFn) -> TokenItem:
    item = TokenItem(draw(session), draw(u32), draw(u32), draw(st.sampled_from(FinishReason)))
    if draw(st.booleans()):
        return item
    top = draw(st.lists(st.tuples(u32, real), max_size=20))
    return replace(item, logprob=draw(real), top_logprobs=tuple(top))


@st.composite
def openings(draw: st.DrawFn) -> OpenSession:
    num_prompt_tokens = draw(u32)
    max_num_hashes = min(4, num_prompt_tokens // 16)
    return OpenSession(
        session=draw(session),
        model=draw(node),
        route=tuple(draw(st.lists(st.builds(Stage, node, text, u32, u32), max_size=4))),
        stage_index=draw(stage_index),
        head=draw(node),
        payer=draw(node),
        key_id=draw(session),
        hold_microcredits=draw(u63),
        num_prompt_tokens=num_prompt_tokens,
        sampling=draw(sampling),
        deadline_ms=draw(u63),
        rate_card_version=draw(u32),
        num_output_tokens_before=draw(u32),
        prompt_ids=array("I", draw(st.lists(u32, max_size=50))),
        prefix_hashes=tuple(draw(st.lists(session, max_size=max_num_hashes))),
        max_num_draft_tokens=draw(st.integers(0, 15)),
        authorization=draw(st.binary(max_size=1024)),
    )


frames: st.SearchStrategy[Frame] = st.one_of(
    hidden_batches(),
    st.builds(TokenBatch, st.lists(token_items(), min_size=1, max_size=6).map(tuple)),
    openings(),
    st.builds(StartSession, session, blocks),
    st.builds(CloseSession, session),
    st.builds(SessionOpened, session, stage_index, blocks),
    st.builds(SessionError, session, stage_index, st.sampled_from(ErrorCode), text),
    st.builds(SignReceipt, session, receipt),
    st.builds(ReceiptSigned, session, receipt),
    st.builds(StageTiming, session, stage_index, u63, u63, u63, u63),
    st.builds(Ping, st.integers(0, 2**64 - 1)),
    st.builds(Pong, st.integers(0, 2**64 - 1)),
)


def read(raw: bytes, lane: Lane = Lane.BULK) -> Frame:
    prefix = parse_prefix(raw[:PREFIX_BYTES], lane)
    end = PREFIX_BYTES + prefix.header_bytes
    return decode(prefix, raw[PREFIX_BYTES:end], raw[end:])


def framed(number: int, header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack("!BBII", WIRE_VERSION, number, len(header), len(payload)) + header + payload


@given(frames)
@settings(max_examples=400, deadline=None)
def test_a_frame_comes_back_as_it_was(frame: Frame) -> None:
    assert read(b"".join(encode(frame))) == frame


@given(st.integers(0, 13), st.binary(max_size=200), st.binary(max_size=40))
@settings(max_examples=600, deadline=None)
def test_random_bytes_are_refused_and_nothing_else(number: int, header: bytes, payload: bytes) -> None:
    try:
        frame = read(framed(number, header, payload))
    except FrameError:
        return
    assert b"".join(encode(frame)) == framed(number, header, payload)


plain = st.recursive(
    st.one_of(
        st.integers(-(2**70), 2**70),
        st.binary(max_size=40),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
        st.floats(),
        st.booleans(),
        st.none(),
        st.builds(cbor2.CBORTag, st.integers(0, 300), st.text("ab(+*", max_size=5)),
    ),
    lambda inner: st.lists(inner, max_size=14) | st.dictionaries(st.integers(), inner, max_size=3),
    max_leaves=20,
)


@given(st.integers(1, 12), plain, st.binary(max_size=16))
@settings(max_examples=600, deadline=None)
def test_well_formed_cbor_of_any_shape_is_refused_unless_it_is_a_frame(
    number: int, value: object, payload: bytes
) -> None:
    raw = framed(number, cbor2.dumps(value), payload)
    try:
        frame = read(raw)
    except FrameError:
        return
    assert b"".join(encode(frame)) == raw


@given(frames, st.data())
@settings(max_examples=600, deadline=None)
def test_a_frame_with_one_changed_byte_is_another_frame_or_refused(frame: Frame, data: st.DataObject) -> None:
    raw = bytearray(b"".join(encode(frame)))
    place = data.draw(st.integers(PREFIX_BYTES, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    try:
        changed = read(bytes(raw))
    except FrameError:
        return
    assert b"".join(encode(changed)) == bytes(raw)


@pytest.mark.parametrize(
    ("number", "header_bytes", "payload_bytes", "lane"),
    [
        (6, MAX_BATCH_HEADER_BYTES + 1, 0, Lane.BULK),
        (7, MAX_BATCH_HEADER_BYTES + 1, 0, Lane.BULK),
        (1, MAX_HEADER_BYTES + 1, 0, Lane.DECODE),
        (6, 10, MAX_ROWS_BYTES[Lane.BULK] + 1, Lane.BULK),
        (6, 10, MAX_ROWS_BYTES[Lane.DECODE] + 1, Lane.DECODE),
        (1, 10, MAX_OPENING_PAYLOAD_BYTES + 1, Lane.DECODE),
        (7, 10, 1, Lane.DECODE),
        (11, 10, 2**32 - 1, Lane.DECODE),
        (0, 1, 0, Lane.DECODE),
        (13, 1, 0, Lane.DECODE),
    ],
)
def test_impossible_sizes_and_types_are_refused_on_the_prefix_alone(
    number: int, header_bytes: int, payload_bytes: int, lane: Lane
) -> None:
    with pytest.raises(FrameError):
        parse_prefix(struct.pack("!BBII", WIRE_VERSION, number, header_bytes, payload_bytes), lane)


@pytest.mark.parametrize(
    "header",
    [
        b"\x81\x18\x05",  # an integer longer than it need be
        b"\x9f\x05\xff",  # an array without a length
        b"\x81\x05\x00",  # something after the end
        b"\x81\xc2\x41\x05",  # a small integer as a tagged big one
        b"\x81\xf5",  # true is not 1
        b"\x81\xfb" + struct.pack("!d", 5.0),  # 5.0 is not 5
        b"\x81\x20",  # below zero
        b"\x9b" + b"\x00" + b"\xff" * 7,  # an array of 2**56 items
        b"\x81" * 1000,  # a thousand arrays deep
    ],
)
def test_headers_have_one_encoding_only(header: bytes) -> None:
    assert read(framed(11, b"\x81\x05")) == Ping(5)
    with pytest.raises(FrameError):
        read(framed(11, header))


def test_rows_must_have_the_announced_shape() -> None:
    raw = b"".join(encode(rows_frame(1, 64)))
    prefix = parse_prefix(raw[:PREFIX_BYTES], Lane.BULK)
    header = raw[PREFIX_BYTES : PREFIX_BYTES + prefix.header_bytes]
    for num_bytes in (0, 60, 68, 128):
        with pytest.raises(FrameError):
            decode(prefix._replace(payload_bytes=num_bytes), header, bytes(num_bytes))


def test_rows_are_not_copied_either_way() -> None:
    rows = bytearray(64)
    frame = HiddenBatch((HiddenItem(SESSION, 0, 1),), Dtype.FLOAT32, 16, memoryview(rows))
    first, payload = encode(frame)
    received = bytearray(payload)
    prefix = parse_prefix(first[:PREFIX_BYTES], Lane.DECODE)
    decoded = decode(prefix, first[PREFIX_BYTES:], received)
    rows[0] = received[1] = 9
    assert payload[0] == 9
    assert isinstance(decoded, HiddenBatch)
    assert decoded.rows[1] == 9


def test_a_long_error_message_is_cut_rather_than_refused() -> None:
    frame = SessionError(SESSION, 0, ErrorCode.INTERNAL, "x" * 5000)
    assert read(b"".join(encode(frame))) == replace(frame, message="x" * MAX_NUM_MESSAGE_CHARS)


@pytest.mark.parametrize("empty", [HiddenBatch((), Dtype.FLOAT32, 16, b""), TokenBatch(())])
def test_a_batch_of_nothing_is_refused(empty: Frame) -> None:
    with pytest.raises(FrameError):
        read(b"".join(encode(empty)))


def test_prompt_ids_stay_as_small_as_they_came() -> None:
    frame = replace(open_session(bytes(32)), prompt_ids=array("I", range(MAX_NUM_PROMPT_IDS)))
    first, payload = encode(frame)
    prefix = parse_prefix(first[:PREFIX_BYTES], Lane.DECODE)
    tracemalloc.start()
    try:
        decoded = decode(prefix, first[PREFIX_BYTES:], payload)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert decoded == frame


def batch(header: bytes, payload: bytes = b"") -> bytes:
    return framed(6 if payload else 7, header, payload)


HIDDEN_START = struct.pack("!BIH", Dtype.FLOAT32, 4, 1)
TOKENS_START = struct.pack("!H", 1)


def hidden_item(num_tokens: int, num_draft_ids: int, num_ids_said: int) -> bytes:
    ids = bytes(4 * num_ids_said)
    return HIDDEN_START + SESSION + struct.pack("!IIB", 0, num_tokens, num_draft_ids) + ids


def token_item(reason: int, num_top: int, rest: bytes = b"") -> bytes:
    return TOKENS_START + SESSION + struct.pack("!IIBb", 0, 7, reason, num_top) + rest


@pytest.mark.parametrize(
    "header",
    [
        b"",
        HIDDEN_START,
        hidden_item(0, 0, 0),
        hidden_item(1, 0, 1),  # ids nobody announced
        hidden_item(1, 1, 0),  # ids announced and not there
        hidden_item(1, 2, 2),  # more ids than rows
        hidden_item(1, 255, 255),
        struct.pack("!BIH", 4, 4, 1) + SESSION + struct.pack("!IIB", 0, 1, 0),  # unknown dtype
        struct.pack("!BIH", 3, 4, 1) + SESSION + struct.pack("!IIB", 0, 1, 0),  # 8-bit rows take 6 bytes
        struct.pack("!BIH", 0, 0, 1) + SESSION + struct.pack("!IIB", 0, 1, 0),
        struct.pack("!BIH", 0, 4, MAX_NUM_ITEMS + 1) + 5000 * (SESSION + struct.pack("!IIB", 0, 1, 0)),
    ],
)
def test_rows_with_an_impossible_header_are_refused(header: bytes) -> None:
    assert isinstance(read(batch(hidden_item(1, 1, 1), bytes(16))), HiddenBatch)
    with pytest.raises(FrameError):
        read(batch(header, bytes(16)))


@pytest.mark.parametrize(
    "header",
    [
        token_item(3, -1),
        token_item(0, -2),
        token_item(0, 21, bytes(8 + 21 * 12)),
        token_item(0, 0),
        token_item(0, -1, bytes(8)),
        token_item(0, 1, bytes(8)),
        token_item(0, 0, struct.pack("!d", float("nan"))),
        token_item(0, 1, bytes(12) + struct.pack("!d", float("-inf"))),
    ],
)
def test_tokens_with_impossible_fields_are_refused(header: bytes) -> None:
    assert isinstance(read(batch(token_item(0, -1))), TokenBatch)
    assert isinstance(read(batch(token_item(0, 1, bytes(20)))), TokenBatch)
    with pytest.raises(FrameError):
        read(batch(header))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(min_p=1.1),
        Sampling(min_p=-0.1),
        Sampling(temperature=float("nan")),
        Sampling(frequency_penalty=101.0),
        Sampling(presence_penalty=float("-inf")),
        Sampling(repetition_penalty=0.0),
        Sampling(num_top_logprobs=21),
        Sampling(num_top_logprobs=-2),
        Sampling(logit_bias=((1, 1e6),)),
        Sampling(logit_bias=((-1, 1.0),)),
        Sampling(logit_bias=((1, 1.0),) * 1025),
    ],
)
def test_sampling_nobody_would_take_is_not_even_sent(sampling: Sampling) -> None:
    with pytest.raises(FrameError):
        encode(replace(open_session(bytes(32)), sampling=sampling))


@pytest.mark.parametrize(
    "change",
    [
        {"prefix_hashes": (SESSION,)},  # of a prompt with no full block
        {"num_prompt_tokens": 2**21, "prefix_hashes": (SESSION,) * (MAX_NUM_PREFIX_HASHES + 1)},
        {"max_num_draft_tokens": 16},
    ],
)
def test_openings_beyond_their_bounds_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(FrameError):
        read(b"".join(encode(replace(open_session(bytes(32)), **change))))


def test_cached_tokens_are_whole_blocks() -> None:
    for frame in (SessionOpened(SESSION, 0, 15), StartSession(SESSION, 17)):
        with pytest.raises(FrameError):
            read(b"".join(encode(frame)))


def test_a_logprob_that_is_no_number_travels_as_the_least() -> None:
    minus, nan = float("-inf"), float("nan")
    frame = TokenBatch((TokenItem(SESSION, 1, 2, FinishReason.NONE, nan, ((3, minus), (4, -1.0))),))
    (item,) = frame.items
    said = replace(item, logprob=LEAST_LOGPROB, top_logprobs=((3, LEAST_LOGPROB), (4, -1.0)))
    assert read(b"".join(encode(frame))) == TokenBatch((said,))


@pytest.mark.parametrize("num_streams", [1, 16])
def test_the_bytes_of_a_step_do_not_grow(num_streams: int) -> None:
    """The prefix, the fixed fields, an item for each stream, and the rows."""
    sessions = [bytes([number]) * 16 for number in range(num_streams)]
    rows = HiddenBatch(
        tuple(HiddenItem(session, 700, 1) for session in sessions),
        Dtype.FLOAT32,
        576,
        bytes(num_streams * 576 * 4),
    )
    tokens = TokenBatch(tuple(TokenItem(session, 700, 49151, FinishReason.NONE) for session in sessions))
    assert sum(map(len, encode(rows))) == 10 + 7 + num_streams * (25 + 576 * 4)
    assert sum(map(len, encode(tokens))) == 10 + 2 + num_streams * 26
