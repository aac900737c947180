"""Sessions over a ring of engines: frames per token, cancelling, KV room, deadlines, losses, receipts."""

from __future__ import annotations

import random
import threading
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ledger.entry import DisputeReason
from ledger.rate_card import DEFAULT_RATE_CARD
from ledger.receipt import SignedReceipt
from node.engine import admission as admission_module
from node.engine import engine as engine_module
from node.engine import unpaid as unpaid_module
from node.engine.admission import MAX_SESSION_MS
from node.engine.arrivals import MAX_UNSTARTED_MS
from node.engine.dialler import MAX_NUM_DIALS_PER_HEAD
from node.engine.endings import MAX_UNSIGNED_MS
from node.engine.engine import MAX_NUM_ENTRIES_PER_STEP
from node.engine.events import ReceiptHeld, WorkDisputed
from node.engine.inbox import Inbox
from node.engine.messages import MAX_NUM_RATE_CARDS
from node.engine.meter import MAX_NUM_UNSIGNED_FIRST_TOKENS, MAX_NUM_UNSIGNED_TOKENS
from node.engine.scheduler import StepLimits
from node.links.frames import (
    CloseSession,
    ErrorCode,
    FinishReason,
    Frame,
    HiddenBatch,
    OpenSession,
    Sampling,
    StartSession,
    TokenBatch,
)
from node.links.memory_links import MemoryHead
from tests.engine.ring import GREEDY, Heard, Ring, wait_until
from tests.engine.tiny import NUM_LAYERS, VOCAB_SIZE, TinyModel

PROMPT = [5, 9, 17, 33, 65, 129, 60]
ENDLESS = Sampling(temperature=0, max_num_output_tokens=400, ignore_eos=True)


def begin(ring: Ring, sampling: Sampling = GREEDY) -> tuple[OpenSession, Heard]:
    opening = ring.opening(PROMPT, sampling)
    heard = ring.open(opening)
    assert not heard.errors
    ring.start(opening)
    return opening, heard


def sent_by(ring: Ring, kind: type[Frame]) -> list[int]:
    counts = [engine.links.counts().sent.get(kind) for engine in ring.engines]
    return [count.num_frames if count else 0 for count in counts]


def received_bytes(ring: Ring, kind: type[Frame]) -> int:
    counts = [engine.links.counts().received.get(kind) for engine in ring.engines]
    return sum(count.num_bytes for count in counts if count)


def test_a_decode_step_is_three_frames_and_a_copy_to_the_head(llama: TinyModel) -> None:
    num_tokens = 12
    with Ring(llama.package, (1, 3)) as ring:
        ring.generate([PROMPT], replace(GREEDY, max_num_output_tokens=num_tokens))
        # One pass per token (the first over the prompt); the last token goes to the head alone.
        wait_until(lambda: sum(sent_by(ring, TokenBatch)) == 2 * num_tokens - 1)
        assert sent_by(ring, HiddenBatch) == [num_tokens, num_tokens, 0]
        assert sent_by(ring, TokenBatch) == [0, 0, 2 * num_tokens - 1]
        rows = (len(PROMPT) + num_tokens - 1) * 2 * 48 * 4
        assert received_bytes(ring, HiddenBatch) - rows < 100 * 2 * num_tokens


def test_the_prompt_travels_once(llama: TinyModel) -> None:
    with Ring(llama.package, (1, 3)) as ring:
        prompt = [150 + n % 40 for n in range(300)]
        opening = ring.opening(prompt, replace(GREEDY, max_num_output_tokens=4))
        heard = ring.open(opening)
        opened_bytes = received_bytes(ring, OpenSession)
        ring.start(opening)
        wait_until(lambda: heard.is_over)
        assert received_bytes(ring, OpenSession) == opened_bytes
        assert received_bytes(ring, StartSession) < 100
        # Two hops of rows, and nothing of the 300 ids with them.
        assert received_bytes(ring, HiddenBatch) < 2 * 303 * 48 * 4 + 8 * 100


def test_sessions_of_one_step_share_a_frame(llama: TinyModel) -> None:
    num_sessions, num_tokens = 8, 30
    with Ring(llama.package, (2,)) as ring:
        sampling = replace(GREEDY, max_num_output_tokens=num_tokens)
        ring.generate([PROMPT] * num_sessions, sampling)
        assert sum(sent_by(ring, HiddenBatch)) < num_sessions * num_tokens / 2


def test_cancelling_frees_the_kv_at_once_and_stops_the_work(llama: TinyModel) -> None:
    with Ring(llama.package, (1, 3)) as ring:
        opening, heard = begin(ring, ENDLESS)
        other = ring.opening(PROMPT, replace(GREEDY, max_num_output_tokens=40))
        other_heard = ring.open(other)
        ring.start(other)
        wait_until(lambda: len(heard.tokens) > 3)
        assert not ring.all_kv_free()
        ring.close_session(opening)
        wait_until(lambda: other_heard.is_over)
        assert other_heard.finish_reason is FinishReason.LENGTH
        ring.close_session(other)
        wait_until(ring.all_kv_free)
        wait_until(lambda: len(heard.timings) == 3)
        assert not heard.errors
        assert {event.reason for event in ring.ended()} == {""}
        assert all(timing.num_steps > 3 and timing.compute_us > 0 for timing in heard.timings)
        # Frames of a session nobody knows any more are dropped.
        ring.close_session(opening)
        assert ring.generate([PROMPT])[0]


def test_no_kv_room_is_refused_and_room_comes_back(llama: TinyModel) -> None:
    prompt, sampling = PROMPT * 13, replace(GREEDY, max_num_output_tokens=60)
    with Ring(llama.package, (2,), kv_tokens=160) as ring:
        first = ring.opening(prompt, sampling)
        assert not ring.open(first).errors
        second = ring.opening(prompt, sampling)
        errors = ring.open(second).errors
        assert {error.code for error in errors} == {ErrorCode.NO_KV_ROOM}
        assert "107 tokens of KV room needed, 48 of 160 are free" in errors[0].message
        ring.close_session(second)
        ring.close_session(first)
        third = ring.opening(prompt, sampling)
        assert not ring.open(third).errors
        ring.close_session(third)
        wait_until(ring.all_kv_free)


def test_a_request_that_never_fits_is_told_what_it_needs(llama: TinyModel) -> None:
    with Ring(llama.package, (2,), kv_tokens=160) as ring:
        errors = ring.open(ring.opening(PROMPT, replace(GREEDY, max_num_output_tokens=154))).errors
        assert {error.code for error in errors} == {ErrorCode.KV_BUDGET_TOO_SMALL}
        assert errors[0].message == "161 tokens of KV room may be needed, this stage has 160 in all"
        assert not ring.open(ring.opening(PROMPT, replace(GREEDY, max_num_output_tokens=153))).errors


def test_eos_ends_unless_ignored_or_too_early(llama: TinyModel) -> None:
    greedy = llama.generate(PROMPT, 16)
    stop = greedy[5]
    first = greedy.index(stop)
    with Ring(llama.package, (2,)) as ring:
        stopping = replace(GREEDY, ignore_eos=False, eos_token_ids=(stop,))
        assert ring.generate([PROMPT], stopping) == [greedy[: first + 1]]
        assert ring.generate([PROMPT], replace(stopping, ignore_eos=True)) == [greedy]
        later = ring.generate([PROMPT], replace(stopping, min_num_output_tokens=first + 3))[0]
        assert later[:first] == greedy[:first]
        assert stop not in later[: first + 3]


def test_sampled_tokens_depend_on_seed_and_position_only(llama: TinyModel) -> None:
    rng = random.Random(3)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (3, 20, 41)]
    base = Sampling(temperature=0.9, top_p=0.95, top_k=60, max_num_output_tokens=20, ignore_eos=True)
    samplings = [replace(base, seed=seed) for seed in (1, 2, 2**63 + 5)]
    runs = []
    for cuts, limits in (((), StepLimits()), ((1, 3), StepLimits(max_num_prefill_tokens=8))):
        with Ring(llama.package, cuts, limits=limits) as ring:
            runs.append([ring.generate([p], s)[0] for p, s in zip(prompts, samplings, strict=True)])
            runs.append(ring.generate(prompts, *samplings))
            reseeded = ring.generate([prompts[0]], replace(base, seed=77))
    assert runs[0] == runs[1] == runs[2] == runs[3]
    assert reseeded != [runs[0][0]]


def test_a_replay_continues_with_the_same_tokens(llama: TinyModel) -> None:
    sampling = Sampling(temperature=1.1, seed=9, max_num_output_tokens=20, ignore_eos=True)
    with Ring(llama.package, (2,)) as ring:
        whole = ring.generate([PROMPT], sampling)[0]
        opening = replace(ring.opening(PROMPT + whole[:8], sampling), num_output_tokens_before=8)
        heard = ring.open(opening)
        ring.start(opening)
        wait_until(lambda: heard.is_over)
    assert whole[:8] + heard.tokens == whole
    assert heard.finish_reason is FinishReason.LENGTH


def test_a_deadline_ends_a_session(llama: TinyModel) -> None:
    now_ms = [1_000]
    with Ring(llama.package, (2,), clock_ms=lambda: now_ms[0]) as ring:
        opening = replace(ring.opening(PROMPT, GREEDY), deadline_ms=1_050)
        heard = ring.open(opening)
        now_ms[0] = 1_050
        wait_until(lambda: len(heard.errors) == 2)
        assert {error.code for error in heard.errors} == {ErrorCode.DEADLINE}
        assert ring.all_kv_free()
        late = replace(ring.opening(PROMPT, GREEDY), deadline_ms=1_050)
        assert ring.open(late).errors[0].code is ErrorCode.DEADLINE


def test_a_far_deadline_does_not_trouble_the_loop(llama: TinyModel) -> None:
    with Ring(llama.package) as ring:
        assert ring.open(replace(ring.opening(PROMPT), deadline_ms=2**62)).opened == {0}
        assert ring.generate([PROMPT])[0] == llama.generate(PROMPT, 16)


def test_a_lost_neighbour_ends_the_sessions_over_it_and_no_others(llama: TinyModel) -> None:
    with Ring(llama.package, (1, 3)) as ring:
        _, heard = begin(ring, ENDLESS)
        wait_until(lambda: len(heard.tokens) > 2)
        ring.engines[1].stop()
        wait_until(lambda: {error.stage_index for error in heard.errors} >= {0, 2})
        assert {e.code for e in heard.errors} <= {ErrorCode.NEXT_HOP_UNREACHABLE, ErrorCode.SHUTTING_DOWN}
        wait_until(ring.all_kv_free)
        again = ring.opening(PROMPT)
        again_heard = ring.heard.setdefault(again.session, Heard())
        ring.head.send(ring.route[0].node, again)
        wait_until(lambda: bool(again_heard.errors))
        assert again_heard.errors[0].code is ErrorCode.NEXT_HOP_UNREACHABLE


def test_a_lost_head_frees_its_sessions(llama: TinyModel) -> None:
    with Ring(llama.package, (2,)) as ring:
        begin(ring, ENDLESS)
        ring.head.close()
        wait_until(lambda: len(ring.ended()) == 2)
        assert ring.all_kv_free()
        assert all("head is gone" in event.reason for event in ring.ended())


def test_a_failing_step_ends_its_session_and_the_engine_lives_on(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ring(llama.package, (2,)) as ring:
        with monkeypatch.context() as patch:

            def fail(*_: object) -> None:
                raise RuntimeError("a kernel failed")

            patch.setattr(ring.shards[1].shard, "run", fail)
            _, heard = begin(ring)
            wait_until(lambda: bool(heard.errors))
        assert heard.errors[0].code is ErrorCode.INTERNAL
        assert heard.errors[0].message == "a step failed: RuntimeError"
        ring.close_session(ring.opening(PROMPT))
        assert ring.generate([PROMPT])[0] == llama.generate(PROMPT, 16)


BAD_OPENINGS: dict[str, tuple[Callable[[OpenSession], OpenSession], ErrorCode, str]] = {
    "unknown model": (lambda o: replace(o, model=bytes(32)), ErrorCode.UNKNOWN_SHARD, "not loaded"),
    "foreign head": (lambda o: replace(o, head=bytes(32)), ErrorCode.BAD_FRAME, "by its head"),
    "other stage": (lambda o: replace(o, stage_index=1), ErrorCode.BAD_FRAME, "not that stage"),
    "gap": (
        lambda o: replace(o, route=(o.route[0], replace(o.route[1], start_layer=3))),
        ErrorCode.BAD_FRAME,
        "do not join",
    ),
    "short": (lambda o: replace(o, route=o.route[:1]), ErrorCode.BAD_FRAME, f"2 of {NUM_LAYERS} layers"),
    "same node twice": (
        lambda o: replace(o, route=(o.route[0], replace(o.route[0], start_layer=2, end_layer=4))),
        ErrorCode.BAD_FRAME,
        "visits a node once",
    ),
    "no prompt": (lambda o: replace(o, num_prompt_tokens=0, prompt_ids=()), ErrorCode.BAD_FRAME, "a prompt"),
    "missing ids": (lambda o: replace(o, prompt_ids=()), ErrorCode.BAD_FRAME, "whole prompt"),
    "foreign id": (
        lambda o: replace(o, prompt_ids=(VOCAB_SIZE, *o.prompt_ids[1:])),
        ErrorCode.BAD_FRAME,
        "outside the vocabulary",
    ),
    "too long": (
        lambda o: replace(o, sampling=replace(o.sampling, max_num_output_tokens=4000)),
        ErrorCode.BAD_FRAME,
        "do not fit the context of 512",
    ),
    "rate card": (lambda o: replace(o, rate_card_version=9), ErrorCode.UNKNOWN_SHARD, "rate card 9"),
}


@pytest.mark.parametrize("name", list(BAD_OPENINGS))
def test_a_bad_opening_is_refused_with_its_reason(llama: TinyModel, name: str) -> None:
    change, code, words = BAD_OPENINGS[name]
    with Ring(llama.package, (2,)) as ring:
        opening = change(ring.opening(PROMPT))
        heard = ring.heard.setdefault(opening.session, Heard())
        ring.head.send(ring.route[0].node, opening)
        wait_until(lambda: bool(heard.errors))
        assert heard.errors[0].code is code
        assert words in heard.errors[0].message
        assert ring.all_kv_free()


def test_a_stage_accepts_the_newest_rate_cards_and_no_older_one(llama: TinyModel) -> None:
    """An old cheaper card is a discount that a head would give itself."""
    cards = [replace(DEFAULT_RATE_CARD, version=version) for version in range(2, 2 + MAX_NUM_RATE_CARDS)]
    with Ring(llama.package) as ring:
        for card in cards[:-1]:
            ring.engines[0].set_rate_card(card)
        assert not ring.open(ring.opening(PROMPT, GREEDY)).errors
        ring.engines[0].set_rate_card(cards[-1])
        heard = ring.open(ring.opening(PROMPT, GREEDY))
        assert heard.errors[0].code is ErrorCode.UNKNOWN_SHARD
        assert not ring.open(replace(ring.opening(PROMPT, GREEDY), rate_card_version=2)).errors


def test_only_its_head_may_steer_a_session(llama: TinyModel) -> None:
    with Ring(llama.package) as ring:
        opening, heard = begin(ring, ENDLESS)
        ring.engines[0]._post(ring.engines[0]._arrivals.frame, bytes(32), CloseSession(opening.session))
        num_tokens = len(heard.tokens)
        wait_until(lambda: len(heard.tokens) > num_tokens + 3)
        assert not ring.ended()


def test_receipts_are_co_signed_up_to_the_own_count_and_disputed_above(llama: TinyModel) -> None:
    num_tokens = 10
    with Ring(llama.package, (1, 3)) as ring:
        opening, heard = begin(ring, replace(GREEDY, max_num_output_tokens=num_tokens))
        wait_until(lambda: heard.is_over)
        for index in range(3):
            ring.send_receipt(ring.receipt(opening, index, 1, len(PROMPT), num_tokens))
        wait_until(lambda: len(heard.receipts) == 3)
        assert all(signed.is_co_signed for signed in heard.receipts)
        ring.send_receipt(ring.receipt(opening, 1, 2, len(PROMPT), num_tokens + 1))
        wait_until(lambda: bool(heard.errors))
        assert heard.errors[0].code is ErrorCode.DISPUTED_RECEIPT
        assert heard.errors[0].stage_index == 1
        assert f"is {num_tokens + 1}, the stage counted {num_tokens}" in heard.errors[0].message


def test_a_head_that_does_not_sign_is_waited_for(llama: TinyModel) -> None:
    """Less long for the first signature, which is for the prompt too; then up to the limit, no further."""
    num_first = MAX_NUM_UNSIGNED_FIRST_TOKENS + 1
    now_ms = [0]
    with Ring(llama.package, (2,), clock_ms=lambda: now_ms[0]) as ring:
        opening, heard = begin(ring, ENDLESS)
        session = ring.engines[0]._book.sessions[opening.session]
        wait_until(lambda: session.is_paused and bool(session.waiting))
        # Others are served meanwhile, and the one that waits is not.
        ring.generate([PROMPT])
        assert len(heard.tokens) == num_first
        wait_until(lambda: session.group.num_decoding == 0)
        for index in range(2):
            ring.send_receipt(ring.receipt(opening, index, 1, len(PROMPT), 20))
        num_then = 20 + MAX_NUM_UNSIGNED_TOKENS + 1
        wait_until(lambda: len(heard.tokens) == num_then)
        wait_until(lambda: session.is_paused and bool(session.waiting))
        # In time it goes on as if nothing had been.
        now_ms[0] += MAX_UNSIGNED_MS - 1
        for index in range(2):
            ring.send_receipt(ring.receipt(opening, index, 2, len(PROMPT), 30))
        wait_until(lambda: len(heard.tokens) == num_then + 10)
        wait_until(lambda: session.is_paused and bool(session.waiting))
        assert not heard.errors
        assert not [event for event in ring.events if isinstance(event, WorkDisputed)]


def test_a_head_that_goes_on_not_signing_is_given_up_and_disputed(llama: TinyModel) -> None:
    now_ms = [0]
    with Ring(llama.package, clock_ms=lambda: now_ms[0]) as ring:
        opening, heard = begin(ring, ENDLESS)
        session = ring.engines[0]._book.sessions[opening.session]
        wait_until(lambda: session.is_paused and bool(session.waiting))
        ring.send_receipt(ring.receipt(opening, 0, 1, len(PROMPT), 20))
        wait_until(lambda: session.is_paused and len(heard.tokens) > 200)
        now_ms[0] += MAX_UNSIGNED_MS
        ring.engines[0].shards().result(10)
        wait_until(lambda: bool(heard.errors))
        assert heard.errors[0].code is ErrorCode.UNSIGNED_LIMIT
        assert f"signed for 20 of {len(heard.tokens)}" in heard.errors[0].message
        (dispute,) = [event for event in ring.events if isinstance(event, WorkDisputed)]
        assert (dispute.session, dispute.reason) == (opening.session, DisputeReason.UNSIGNED_LIMIT)
        # The newest that was co-signed says for whom the work was.
        assert SignedReceipt.decode(dispute.receipt).receipt.num_output_tokens == 20
        wait_until(ring.all_kv_free)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_output_tokens": 11}, DisputeReason.COUNTS),
        ({"num_prompt_tokens": 1}, DisputeReason.COUNTS),
        ({"payer": bytes([7]) * 32}, DisputeReason.TERMS),
        ({"num_parameters": 1}, DisputeReason.TERMS),
        ({"amount_microcredits": 0}, DisputeReason.COUNTS),
    ],
)
def test_a_receipt_that_is_not_the_own_count_is_disputed(
    llama: TinyModel, change: dict[str, Any], reason: DisputeReason
) -> None:
    with Ring(llama.package) as ring:
        opening, heard = begin(ring, replace(GREEDY, max_num_output_tokens=10))
        wait_until(lambda: heard.is_over)
        ring.send_receipt(replace(ring.receipt(opening, 0, 1, len(PROMPT), 10), **change))
        wait_until(lambda: bool(heard.errors))
        assert heard.errors[0].code is ErrorCode.DISPUTED_RECEIPT
        (dispute,) = [event for event in ring.events if isinstance(event, WorkDisputed)]
        assert dispute.reason == reason
        assert SignedReceipt.decode(dispute.receipt).receipt.session == opening.session
        assert not [event for event in ring.events if isinstance(event, ReceiptHeld)]


def test_a_head_that_never_pays_is_refused_after_so_many_tokens(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes what it can get of every session and closes it unsigned. Who signs goes on for ever."""
    monkeypatch.setattr(unpaid_module, "MAX_NUM_UNPAID_TOKENS", 500)
    num_tokens = len(PROMPT) + 16
    with Ring(llama.package) as ring:
        num_served = 0
        while not (heard := ring.open(opening := ring.opening(PROMPT, GREEDY))).errors:
            ring.start(opening)
            wait_until(lambda: heard.is_over)
            ring.close_session(opening)
            num_served += 1
        assert heard.errors[0].code is ErrorCode.UNSIGNED_LIMIT
        assert 500 - num_tokens <= num_served * num_tokens <= 500 + 2 * num_tokens
    with Ring(llama.package) as ring:
        for _ in range(3 * num_served):
            opening, heard = begin(ring)
            wait_until(lambda: heard.is_over)  # noqa: B023
            ring.send_receipt(ring.receipt(opening, 0, 1, len(PROMPT), 16))
            ring.close_session(opening)
            assert not heard.errors


def test_what_a_stage_broke_off_itself_is_not_held_against_the_head(llama: TinyModel) -> None:
    with Ring(llama.package) as ring:
        _, heard = begin(ring, ENDLESS)
        wait_until(lambda: len(heard.tokens) > 20)
        engine, loaded = ring.engines[0], ring.shards[0]
        engine.drop_shard(loaded.model, loaded.start_layer, loaded.end_layer).result(10)
        wait_until(lambda: bool(heard.errors))
        assert heard.errors[0].code is ErrorCode.SHUTTING_DOWN
        assert engine._endings.unpaid.num_unpaid(ring.head_key.public) == 0


def test_a_head_that_calls_everything_a_replay_gets_little_for_it(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt of a replay is nobody's to pay. What the stage broke off itself it owes."""
    monkeypatch.setattr(unpaid_module, "MAX_NUM_UNPAID_TOKENS", 5 * len(PROMPT))
    with Ring(llama.package) as ring:
        errors = []
        for _ in range(8):
            opening = replace(ring.opening(PROMPT), num_output_tokens_before=1)
            heard = ring.open(opening)
            errors += [error.code for error in heard.errors]
            ring.close_session(opening)
        assert errors == [ErrorCode.UNSIGNED_LIMIT] * 3
        engine = ring.engines[0]
        engine._endings.unpaid.interrupted(ring.head_key.public, len(PROMPT))
        assert not ring.open(replace(ring.opening(PROMPT), num_output_tokens_before=1)).errors


def test_steps_go_on_under_a_flood(llama: TinyModel) -> None:
    num_calls = 20 * MAX_NUM_ENTRIES_PER_STEP
    with Ring(llama.package) as ring:
        opening, heard = begin(ring, ENDLESS)
        wait_until(lambda: bool(heard.tokens))
        engine, seen = ring.engines[0], []
        session = engine._book.sessions[opening.session]

        def flood() -> None:
            for _ in range(num_calls):
                engine._inbox.put(lambda: seen.append(session.num_steps), b"flooder")

        engine._post(flood)
        wait_until(lambda: len(seen) == num_calls)
        ring.close_session(opening)
    runs = Counter(seen).values()
    assert max(runs) <= MAX_NUM_ENTRIES_PER_STEP + 1


def test_a_peer_with_too_much_waiting_waits_and_others_do_not() -> None:
    inbox, ran = Inbox(max_num_waiting_per_peer=2), []

    def flood() -> None:
        for number in range(3):
            inbox.put_frame(lambda number=number: ran.append(number), b"flooder")

    flooder = threading.Thread(target=flood)
    flooder.start()
    wait_until(lambda: len(inbox._waiting.get(b"flooder", ())) == 2)
    inbox.put_frame(lambda: ran.append("other"), b"other")
    assert flooder.is_alive()
    for _ in range(4):
        call = inbox.take(5)
        assert call is not None
        call()
    flooder.join(5)
    assert ran[1] == "other"
    assert [number for number in ran if number != "other"] == [0, 1, 2]
    assert inbox.take(0) is None


def test_receipts_that_say_nothing_new_are_not_signed(llama: TinyModel) -> None:
    num_tokens = 6
    with Ring(llama.package) as ring:
        opening, heard = begin(ring, replace(GREEDY, max_num_output_tokens=num_tokens))
        wait_until(lambda: heard.is_over)
        for sequence in range(1, 50):
            ring.send_receipt(ring.receipt(opening, 0, sequence, len(PROMPT), num_tokens))
        ring.close_session(opening)
        wait_until(lambda: bool(heard.timings))
        assert [signed.receipt.sequence for signed in heard.receipts] == [1, 2]
        assert not heard.errors


def test_a_session_is_given_time_to_start_and_no_more(llama: TinyModel) -> None:
    now_ms = [0]
    with Ring(llama.package, clock_ms=lambda: now_ms[0]) as ring:
        idle = ring.open(ring.opening(PROMPT))
        running, heard = begin(ring, replace(GREEDY, max_num_output_tokens=2))
        wait_until(lambda: heard.is_over)
        now_ms[0] = MAX_UNSTARTED_MS
        ring.engines[0].shards().result(10)
        wait_until(lambda: bool(idle.errors))
        assert "not started in time" in idle.errors[0].message
        assert running.session in ring.engines[0]._book.sessions
        now_ms[0] = MAX_SESSION_MS
        ring.engines[0].shards().result(10)
        wait_until(lambda: bool(heard.errors))
        assert heard.errors[0].code is ErrorCode.DEADLINE
        assert ring.all_kv_free()


def test_an_opening_whose_head_is_gone_keeps_nothing(llama: TinyModel) -> None:
    with Ring(llama.package, (2,)) as ring:
        opening = ring.opening(PROMPT)
        ring.head.close()
        engine = ring.engines[0]
        engine._post(engine._arrivals.frame, opening.head, opening)
        wait_until(lambda: bool(ring.ended()))
        assert "head is gone" in ring.ended()[0].reason
        assert ring.all_kv_free()


def test_a_head_has_so_many_sessions_and_no_more(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "MAX_NUM_SESSIONS_PER_HEAD", 2)
    with Ring(llama.package) as ring:
        openings = [ring.opening(PROMPT) for _ in range(3)]
        heards = [ring.open(opening) for opening in openings]
        assert "2 sessions of this head" in heards[2].errors[0].message
        ring.close_session(openings[0])
        assert not ring.open(ring.opening(PROMPT)).errors


def test_prompts_are_kept_packed_and_until_the_start_only(llama: TinyModel) -> None:
    with Ring(llama.package) as ring:
        opening = ring.opening(PROMPT, ENDLESS)
        ring.open(opening)
        session = ring.engines[0]._book.sessions[opening.session]
        assert session.prompt_ids == array("I", PROMPT)
        assert not session.opening.prompt_ids
        ring.start(opening)
        wait_until(lambda: session.has_begun)
        assert not session.prompt_ids


def test_routes_to_nowhere_hold_up_nobody_else(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every dial of the first engine hangs, except to the true next hop."""
    with Ring(llama.package, (2,)) as ring:
        links, release = ring.engines[0].links, threading.Event()
        connect, dialled = links.connect, []

        def hang(peer: bytes, data_address: str, timeout_s: float) -> None:
            dialled.append(data_address)
            if data_address != "memory:0":
                release.wait(10)
            connect(peer, data_address, timeout_s)

        monkeypatch.setattr(links, "connect", hang)
        num_hanging = 3 * MAX_NUM_DIALS_PER_HEAD
        hanging = [ring.opening(PROMPT) for _ in range(num_hanging)]
        for number, opening in enumerate(hanging):
            route = (opening.route[0], replace(opening.route[1], data_address=f"nowhere:{number}"))
            ring.heard[opening.session] = Heard()
            ring.head.send(route[0].node, replace(opening, route=route))
        refused = num_hanging - MAX_NUM_DIALS_PER_HEAD
        wait_until(lambda: sum(bool(ring.heard[one.session].errors) for one in hanging) == refused)
        assert "too many" in ring.heard[hanging[-1].session].errors[0].message
        ring.close_session(hanging[0])
        other = MemoryHead(ring.network, bytes([7]) * 32, ring._on_frame, lambda *_: None)
        other.connect(ring.route[0].node)
        opening = replace(ring.opening(PROMPT), head=other.node)
        heard = ring.heard.setdefault(opening.session, Heard())
        other.send(ring.route[0].node, opening)
        wait_until(lambda: heard.opened == {0})
        release.set()


def test_a_loop_that_cannot_go_on_says_so(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    crashed = threading.Event()

    def fail(*_: object) -> None:
        raise RuntimeError("no schedule")

    with Ring(llama.package) as ring:
        monkeypatch.setattr(ring.engines[0], "_on_crash", crashed.set)
        monkeypatch.setattr(engine_module, "schedule", fail)
        begin(ring)
        assert crashed.wait(10)
