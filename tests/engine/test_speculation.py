"""Guesses change how many passes a text takes, and nothing else: tokens, KV, counts and refusals."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest

from node.engine.native.build import load_kernels
from node.engine.session import StageSession
from node.links.frames import (
    Dtype,
    ErrorCode,
    FinishReason,
    HiddenBatch,
    HiddenItem,
    Lane,
    Sampling,
    SessionError,
    TokenBatch,
    TokenItem,
)
from tests.engine import ring as rings
from tests.engine import tiny as tiny_models
from tests.engine.guessing import GuessingRing, always_guess, guess_from
from tests.engine.ring import GREEDY, Ring, wait_until
from tests.engine.tiny import VOCAB_SIZE, TinyModel, make_tiny

NUM_TOKENS = 70
SEEDED = Sampling(
    temperature=0.9,
    top_p=0.95,
    seed=11,
    max_num_output_tokens=NUM_TOKENS,
    ignore_eos=True,
    num_top_logprobs=2,
)
SAMPLINGS = {
    "greedy": replace(GREEDY, max_num_output_tokens=NUM_TOKENS),
    "seeded": SEEDED,
    "penalties": replace(
        SEEDED, frequency_penalty=0.4, presence_penalty=0.3, repetition_penalty=1.2, logit_bias=((9, 1.5),)
    ),
    "minimum": replace(
        SEEDED, ignore_eos=False, eos_token_ids=tuple(range(3, 40)), min_num_output_tokens=30, temperature=1.5
    ),
}


def make_prompts(num: int, length: int = 21) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for _ in range(num)]


def items_of(ring: Ring, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[TokenItem]]:
    """All that the head was told of each prompt's tokens, without the session's name."""
    before = set(ring.heard)
    ring.generate(prompts, sampling)
    heards = [heard for session, heard in ring.heard.items() if session not in before]
    return [[replace(item, session=bytes(16)) for item in heard.items] for heard in heards]


def texts_of(prompts: Sequence[Sequence[int]], items: Sequence[Sequence[TokenItem]]) -> list[list[int]]:
    return [[*prompt, *(item.token_id for item in told)] for prompt, told in zip(prompts, items, strict=True)]


def num_steps(ring: Ring, stage: int = 0) -> int:
    wait_until(lambda: all(len(heard.timings) == len(ring.route) for heard in ring.heard.values()))
    return sum(t.num_steps for h in ring.heard.values() for t in h.timings if t.stage_index == stage)


@pytest.fixture(scope="module")
def sized_for_kernels(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models._BASE, "hidden_size", 64)
        return make_tiny("llama", tmp_path_factory.mktemp("sized"))


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("cuts", [(), (1, 3)], ids=str)
def test_the_kernels_give_the_same_bits_whatever_is_guessed(
    sized_for_kernels: TinyModel,
    monkeypatch: pytest.MonkeyPatch,
    cuts: tuple[int, ...],
    sampling: Sampling,
) -> None:
    """Tokens, finish reasons and logprobs, with guesses of all kinds of quality, over block boundaries."""
    packed = partial(rings.provision, kernels=load_kernels(), max_num_bits=8)
    monkeypatch.setattr(rings, "provision", packed)
    package, prompts = sized_for_kernels.package, make_prompts(5)
    with Ring(package, cuts) as ring:
        assert type(ring.shards[0].shard).__name__ == "NativeShard"
        expected = items_of(ring, prompts, sampling)
        wait_until(ring.all_kv_free)
        num_steps_without = num_steps(ring)
    nums = guess_from(monkeypatch, texts_of(prompts, expected))
    with GuessingRing(package, cuts) as ring:
        assert items_of(ring, prompts, sampling) == expected
        wait_until(ring.all_kv_free)
        assert num_steps(ring) < num_steps_without
    assert max(nums) > 10


@pytest.mark.parametrize(
    "sampling", [SAMPLINGS["greedy"], SAMPLINGS["penalties"]], ids=["greedy", "penalties"]
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_torch_gives_the_same_tokens(
    tiny: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch, family: str, sampling: Sampling
) -> None:
    model, prompts = tiny(family), make_prompts(3)
    with Ring(model.package, (1, 3)) as ring:
        expected = ring.generate(prompts, sampling)
    guess_from(monkeypatch, [[*p, *tokens] for p, tokens in zip(prompts, expected, strict=True)])
    with GuessingRing(model.package, (1, 3)) as ring:
        assert ring.generate(prompts, sampling) == expected
        wait_until(ring.all_kv_free)


def test_repeating_text_takes_fewer_frames(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As found in the text itself. Tokens under a bias as strong as this go round in circles."""
    always_guess(monkeypatch)
    sampling = replace(GREEDY, max_num_output_tokens=100, logit_bias=((9, 100.0),))
    frames = []
    for kind in (Ring, GuessingRing):
        with kind(llama.package, (1, 3)) as ring:
            assert ring.generate(make_prompts(1), sampling) == [[9] * 100]
            wait_until(ring.all_kv_free)
            sent = ring.engines[0].links.counts().sent[HiddenBatch]
            back = ring.engines[2].links.counts().sent[TokenBatch]
            frames.append((sent.num_frames, back.num_frames))
    assert frames[0][0] >= 100
    assert frames[1][0] < 100 / 8
    # To the first stage and to the head, but for the last one.
    assert frames[1][1] < 2 * 100 / 8


def test_wrong_guesses_are_given_up(llama: TinyModel) -> None:
    """Left to itself, on text that does not repeat: about as many rows as without."""
    prompt = make_prompts(1)[0]
    sampling = replace(SAMPLINGS["greedy"], temperature=2.0, max_num_output_tokens=200)
    with GuessingRing(llama.package) as ring:
        opening = ring.opening(prompt, sampling)
        heard = ring.open(opening)
        session = ring.engines[0]._book.sessions[opening.session]
        ring.sign_for(opening)
        ring.start(opening)
        wait_until(lambda: heard.is_over)
        assert session.speculation is not None
        assert session.num_steps > 190


def test_it_is_off_unless_asked_for(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    always_guess(monkeypatch)
    with Ring(llama.package) as ring:
        assert ring.opening([1]).max_num_draft_tokens == 0
        ring.generate([[7] * 20], SAMPLINGS["greedy"])
        assert num_steps(ring) == NUM_TOKENS


def test_a_last_token_among_the_guesses_is_the_last(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = make_prompts(1)[0]
    sampling = SAMPLINGS["greedy"]
    with Ring(llama.package, (2,)) as ring:
        tokens = ring.generate([prompt], sampling)[0]
    eos = next(token for token in tokens[20:] if token not in tokens[:20])
    num_tokens = tokens.index(eos) + 1
    guess_from(monkeypatch, [[*prompt, *tokens]])
    with GuessingRing(llama.package, (2,)) as ring:
        stopping = replace(sampling, ignore_eos=False, eos_token_ids=(eos,))
        for _ in range(10):
            (items,) = items_of(ring, [prompt], stopping)
            assert [item.token_id for item in items] == tokens[:num_tokens]
            assert [item.finish_reason for item in items[-2:]] == [FinishReason.NONE, FinishReason.STOP]
        wait_until(ring.all_kv_free)


def test_guesses_preempt_nobody(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool is as large as what the sessions need in the end, to the block."""
    prompts = make_prompts(4, 16)
    sampling = replace(GREEDY, max_num_output_tokens=48)
    with Ring(llama.package) as ring:
        expected = ring.generate(prompts, sampling)
    guess_from(monkeypatch, [[*p, *tokens] for p, tokens in zip(prompts, expected, strict=True)])
    with GuessingRing(llama.package, kv_tokens=4 * 64) as ring:
        for _ in range(5):
            assert ring.generate(prompts, sampling) == expected
            wait_until(ring.all_kv_free)


def begin_alone(ring: Ring, num_tokens: int = 200) -> tuple[rings.OpenSession, rings.Heard, StageSession]:
    """A session at a middle stage; its earlier neighbour is the test, its later one hears nothing."""
    ring.engines[2]._arrivals._hidden = lambda *_: None
    opening = ring.opening(make_prompts(1)[0], replace(GREEDY, max_num_output_tokens=num_tokens))
    heard = ring.open(opening)
    return opening, heard, ring.engines[1]._book.sessions[opening.session]


def send_rows(ring: Ring, session: bytes, position: int, num: int, draft_ids: tuple[int, ...] = ()) -> None:
    size = ring.package.manifest.hidden_size
    item = HiddenItem(session, position, num, draft_ids)
    rows = memoryview(bytearray(4 * num * size))
    ring.engines[0].links.send(
        ring.route[1].node, HiddenBatch((item,), Dtype.FLOAT32, size, rows), Lane.DECODE
    )


def counted(ring: Ring, session: StageSession, num_output_tokens: int) -> bool:
    wait_until(lambda: session.meter.num_output_tokens == num_output_tokens)
    return True


def test_a_stage_takes_rows_again_behind_the_last_sure_token(llama: TinyModel) -> None:
    with GuessingRing(llama.package, (1, 3)) as ring:
        ring.max_num_draft_tokens = 4
        opening, heard, session = begin_alone(ring)
        num_prompt_tokens = opening.num_prompt_tokens
        send_rows(ring, opening.session, 0, num_prompt_tokens)
        assert counted(ring, session, 1)
        send_rows(ring, opening.session, num_prompt_tokens, 5, (3, 4, 5, 6))
        assert counted(ring, session, 6)
        assert session.meter.num_kept_output_tokens == 2
        # None came true, then all did, then two of three.
        send_rows(ring, opening.session, num_prompt_tokens + 1, 3, (3, 4))
        assert counted(ring, session, 5)
        assert session.meter.num_kept_output_tokens == 3
        send_rows(ring, opening.session, num_prompt_tokens + 4, 4, (3, 4, 5))
        assert counted(ring, session, 9)
        send_rows(ring, opening.session, num_prompt_tokens + 6, 1)
        assert counted(ring, session, 8)
        assert session.meter.num_kept_output_tokens == 8
        assert not heard.errors
        ring.close_session(opening)
        wait_until(ring.all_kv_free)


BAD_ROWS = {
    "before what is sure": ((0, 5, (3, 4, 5, 6)), (0, 1, ())),
    "after a gap": ((0, 5, (3, 4, 5, 6)), (6, 1, ())),
    "too many": ((0, 6, (3, 4, 5, 6, 7)),),
    "no such id": ((0, 2, (VOCAB_SIZE,)),),
    "two sure rows": ((0, 3, (3,)),),
    "no sure row": ((0, 2, (3, 4)),),
    "behind the prompt's rows": ((-3, 3, (3, 4)),),
    "past the end": ((0, 1, ()), (1, 5, (3, 4, 5, 6))),
}


@pytest.mark.parametrize("name", list(BAD_ROWS))
def test_guesses_that_cannot_be_end_their_session_only(llama: TinyModel, name: str) -> None:
    with GuessingRing(llama.package, (1, 3)) as ring:
        ring.max_num_draft_tokens = 4
        opening, heard, _ = begin_alone(ring, 5 if name == "past the end" else 200)
        num_before = opening.num_prompt_tokens + min(0, BAD_ROWS[name][0][0])
        send_rows(ring, opening.session, 0, num_before)
        for offset, num, draft_ids in BAD_ROWS[name]:
            send_rows(ring, opening.session, opening.num_prompt_tokens + offset, num, draft_ids)
        wait_until(lambda: bool(heard.errors))
        assert {(e.code, e.stage_index) for e in heard.errors} == {(ErrorCode.BAD_FRAME, 1)}
        for stage in (0, 2):
            assert opening.session in ring.engines[stage]._book.sessions
        ring.close_session(opening)
        del ring.engines[2]._arrivals._hidden
        assert ring.generate([make_prompts(1)[0]])[0] == llama.generate(make_prompts(1)[0], 16)
        wait_until(ring.all_kv_free)


def test_tokens_that_were_not_guessed_end_the_session(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last stage is the test: it says what no guess said, and more than there were."""
    always_guess(monkeypatch)
    prompt = [5, 6, 7, 8, 5, 6, 7, 8, 5, 6]
    bad = {
        "another": lambda at: [(at + 1, 8), (at + 2, 9), (at + 3, 9)],
        "more": lambda at: [(at + 1 + n, (8, 5, 6, 7)[n % 4]) for n in range(9)],
        "before": lambda at: [(at, 7)],
        "after": lambda at: [(at + 2, 5)],
        "no such": lambda at: [(at + 1, VOCAB_SIZE)],
    }
    for name, items_at in bad.items():
        with GuessingRing(llama.package, (2,)) as ring:
            ring.max_num_draft_tokens = 7
            opening = ring.opening(prompt, replace(GREEDY, max_num_output_tokens=60))
            heard = ring.open(opening)
            monkeypatch.setattr(ring.engines[1]._arrivals, "_hidden", lambda *_: None)
            session = ring.engines[0]._book.sessions[opening.session]
            ring.start(opening)
            wait_until(lambda session=session: session.has_begun and not session.waiting)
            say(ring, opening.session, [(len(prompt), 7)])
            wait_until(lambda session=session: session.next_position == len(prompt) + 8)
            assert session.draft_ids == (8, 5, 6, 7, 8, 5, 6)
            say(ring, opening.session, items_at(len(prompt)))
            wait_until(lambda heard=heard: bool(heard.errors))
            error = heard.errors[0]
            assert (error.code, error.stage_index) == (ErrorCode.BAD_FRAME, 0), name
            assert isinstance(error, SessionError)


def say(ring: Ring, session: bytes, tokens: Sequence[tuple[int, int]]) -> None:
    items = tuple(TokenItem(session, position, token, FinishReason.NONE) for position, token in tokens)
    ring.engines[1].links.send(ring.route[0].node, TokenBatch(items), Lane.DECODE)
