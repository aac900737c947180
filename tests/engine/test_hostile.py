"""Frames of a member that lies: the session they name ends, the link stays, all other sessions go on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from node.engine.hidden_rows import hidden_batch
from node.links.frames import (
    Dtype,
    ErrorCode,
    FinishReason,
    Frame,
    HiddenBatch,
    HiddenItem,
    Lane,
    OpenSession,
    TokenBatch,
    TokenItem,
)
from tests.engine.ring import GREEDY, Heard, Ring, wait_until
from tests.engine.tiny import VOCAB_SIZE, TinyModel

PROMPT = [5, 9, 17, 33, 65, 129, 60]
OTHER_PROMPT = [8, 1, 90]
HIDDEN_SIZE = 48
INT8_ROW_BYTES = HIDDEN_SIZE + 2
NOBODY = b"nobody's session"
NAN_SCALE = bytes(HIDDEN_SIZE) + b"\x00\x7e"


def rows(
    session: bytes,
    position: int = 7,
    num_tokens: int = 1,
    value: float = 1.0,
    hidden_size: int = HIDDEN_SIZE,
    draft_ids: tuple[int, ...] = (),
) -> HiddenBatch:
    item = HiddenItem(session, position, num_tokens, draft_ids)
    return hidden_batch([item], [torch.full((num_tokens, hidden_size), value)], False)


def small_rows(session: bytes, raw: bytes) -> HiddenBatch:
    return HiddenBatch((HiddenItem(session, 7, 1),), Dtype.INT8, HIDDEN_SIZE, raw)


# What stage 0 says to stage 1 of a session that waits there for its eighth token.
BAD_ROWS = {
    "another size": lambda s: rows(s, hidden_size=40),
    "one value": lambda s: rows(s, hidden_size=1),
    "no number": lambda s: rows(s, value=math.nan),
    "infinite": lambda s: rows(s, value=-math.inf),
    "no number as a scale": lambda s: small_rows(s, NAN_SCALE),
    "8 bits and too short": lambda s: small_rows(s, bytes(INT8_ROW_BYTES - 1)),
    "8 bits and too long": lambda s: small_rows(s, bytes(INT8_ROW_BYTES + 1)),
    "8 bits without scales": lambda s: small_rows(s, bytes(HIDDEN_SIZE)),
    "fewer rows than said": lambda s: replace(rows(s), items=(HiddenItem(s, 7, 2),)),
    "no rows": lambda s: replace(rows(s), items=(HiddenItem(s, 7, 0),)),
    "a size of nothing": lambda s: replace(rows(s), hidden_size=0),
    "a gap": lambda s: rows(s, position=9),
    "once more": lambda s: rows(s, position=6),
    "far beyond": lambda s: rows(s, position=2**32 - 1),
    "two rows, nothing guessed": lambda s: rows(s, num_tokens=2),
    "more guesses than asked for": lambda s: rows(s, num_tokens=3, draft_ids=(1, 2)),
}
BAD_TOKENS = {
    "beyond the vocabulary": lambda s: TokenItem(s, 7, VOCAB_SIZE, FinishReason.NONE),
    "huge": lambda s: TokenItem(s, 7, 2**32 - 1, FinishReason.NONE),
    "a gap": lambda s: TokenItem(s, 300, 1, FinishReason.NONE),
    "far beyond": lambda s: TokenItem(s, 2**32 - 1, 1, FinishReason.NONE),
}


def waiting(ring: Ring) -> tuple[OpenSession, Heard]:
    """A session open at all stages whose prompt has reached stage 1, from the test instead of stage 0."""
    opening = ring.opening(PROMPT, replace(GREEDY, max_num_output_tokens=100))
    heard = ring.open(opening)
    assert not heard.errors
    say(ring, 0, rows(opening.session, 0, len(PROMPT)), Lane.BULK)
    wait_until(lambda: bool(heard.tokens))
    return opening, heard


def errors_of(heard: Heard) -> list[tuple[ErrorCode, int]]:
    """Without stage 0, which never began and is told of a token all the same."""
    return [(error.code, error.stage_index) for error in heard.errors if error.stage_index]


def say(ring: Ring, source: int, frame: Frame, lane: Lane = Lane.DECODE) -> None:
    target = (source + 1) % len(ring.engines)
    ring.engines[source].links.send(ring.route[target].node, frame, lane)


def check_all_goes_on(ring: Ring, llama: TinyModel) -> None:
    for source, engine in enumerate(ring.engines):
        assert engine.links.is_connected(ring.route[(source + 1) % 3].node)
    assert ring.generate([OTHER_PROMPT]) == [llama.generate(OTHER_PROMPT, 16)]
    wait_until(ring.all_kv_free)


def test_impossible_rows_end_their_session_only(llama: TinyModel) -> None:
    with Ring(llama.package, (1, 3)) as ring:
        for name, make in BAD_ROWS.items():
            opening, heard = waiting(ring)
            say(ring, 0, make(opening.session))
            wait_until(lambda heard=heard: bool(errors_of(heard)))
            assert errors_of(heard) == [(ErrorCode.BAD_FRAME, 1)], name
            ring.close_session(opening)
        check_all_goes_on(ring, llama)


def test_impossible_tokens_end_their_session_only(llama: TinyModel) -> None:
    with Ring(llama.package, (1, 3)) as ring:
        for name, make in BAD_TOKENS.items():
            opening = ring.opening(PROMPT, replace(GREEDY, max_num_output_tokens=100))
            heard = ring.open(opening)
            # Before the start no token is due at all; after it, only the next one.
            say(ring, 2, TokenBatch((make(opening.session),)))
            wait_until(lambda heard=heard: bool(heard.errors))
            assert [(e.code, e.stage_index) for e in heard.errors] == [(ErrorCode.BAD_FRAME, 0)], name
            ring.close_session(opening)
        check_all_goes_on(ring, llama)


@pytest.mark.parametrize("lane", list(Lane))
def test_one_bad_session_in_a_frame_does_not_take_the_others_along(llama: TinyModel, lane: Lane) -> None:
    with Ring(llama.package, (1, 3)) as ring:
        bad, bad_heard = waiting(ring)
        good, good_heard = waiting(ring)
        two = torch.ones(2, HIDDEN_SIZE)
        two[0, 5] = math.nan
        items = [HiddenItem(bad.session, 7, 1), HiddenItem(good.session, 7, 1)]
        say(ring, 0, hidden_batch(items, [two], False), lane)
        wait_until(lambda: bool(errors_of(bad_heard)) and len(good_heard.tokens) == 2)
        assert not errors_of(good_heard)
        for opening in (bad, good):
            ring.close_session(opening)
        check_all_goes_on(ring, llama)


def test_frames_of_sessions_nobody_knows_or_of_others_are_dropped(llama: TinyModel) -> None:
    with Ring(llama.package, (1, 3)) as ring:
        opening, heard = waiting(ring)
        say(ring, 0, rows(NOBODY))
        say(ring, 0, small_rows(NOBODY, b"x"))
        say(ring, 2, TokenBatch((TokenItem(NOBODY, 7, 1, FinishReason.NONE),)))
        # Stage 2 is not before stage 1 in this route.
        ring.network.connect_stages(ring.route[2].node, ring.route[1].node)
        ring.engines[2].links.send(ring.route[1].node, rows(opening.session, value=math.nan), Lane.DECODE)
        ring.engines[2].links.send(ring.route[1].node, small_rows(opening.session, b"x"), Lane.DECODE)
        say(ring, 0, rows(opening.session))
        wait_until(lambda: len(heard.tokens) == 2)
        assert not errors_of(heard)
        ring.close_session(opening)
        check_all_goes_on(ring, llama)
