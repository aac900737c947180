"""Prefix hits over a ring: only what all stages have, only for whom it was made, and never a wrong token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from node.engine.prefix_cache import PrefixCache
from node.engine.prefix_hashes import prefix_hashes
from node.links.frames import ErrorCode, OpenSession, StartSession
from node.links.memory_links import MemoryHead
from tests.engine.ring import GREEDY, Heard, Ring, wait_until
from tests.engine.tiny import TinyModel

BEGINNING = [7 + 3 * n % 150 for n in range(70)]


def run(ring: Ring, prompt: Sequence[int], num_cached_tokens: int | None = None) -> list[int]:
    """Tokens of one session; started after fewer cached tokens than there are if that is asked for."""
    opening = ring.opening(prompt)
    heard = ring.open(opening)
    if num_cached_tokens is None:
        ring.start(opening)
    else:
        ring.head.send(opening.route[0].node, StartSession(opening.session, num_cached_tokens))
    wait_until(lambda: heard.is_over)
    ring.close_session(opening)
    wait_until(ring.all_kv_free)
    assert not heard.errors
    return heard.tokens


def cached_at(ring: Ring, prompt: Sequence[int]) -> dict[int, int]:
    opening = ring.opening(prompt)
    heard = ring.open(opening)
    ring.close_session(opening)
    wait_until(ring.all_kv_free)
    return heard.cached


def test_what_is_cached_is_whole_blocks_and_never_the_whole_prompt(llama: TinyModel) -> None:
    with Ring(llama.package, (1, 3), caches_prefixes=True) as ring:
        assert run(ring, BEGINNING) == llama.generate(BEGINNING, 16)
        for prompt, num_tokens in [
            (BEGINNING, 64),
            (BEGINNING[:64], 48),
            (BEGINNING[:65], 64),
            (BEGINNING[:40] + [3] * 40, 32),
            ([3, *BEGINNING], 0),
            (BEGINNING[:16], 0),
        ]:
            assert cached_at(ring, prompt) == dict.fromkeys(range(3), num_tokens)
            assert run(ring, prompt) == llama.generate(prompt, 16)


@pytest.mark.parametrize("num_cached_tokens", [0, 16, 64])
def test_a_session_may_begin_before_what_is_cached(llama: TinyModel, num_cached_tokens: int) -> None:
    with Ring(llama.package, (1, 3), caches_prefixes=True) as ring:
        expected = run(ring, BEGINNING)
        # Somebody goes on using the cached blocks meanwhile.
        other = ring.opening(BEGINNING + [9] * 5, replace(GREEDY, max_num_output_tokens=200))
        other_heard = ring.open(other)
        ring.sign_for(other)
        ring.start(other)
        opening = ring.opening(BEGINNING)
        heard = ring.open(opening)
        ring.head.send(opening.route[0].node, StartSession(opening.session, num_cached_tokens))
        wait_until(lambda: heard.is_over and other_heard.is_over)
        assert heard.tokens == expected
        assert other_heard.tokens == llama.generate(BEGINNING + [9] * 5, 200)
        for one in (opening, other):
            ring.close_session(one)
        wait_until(ring.all_kv_free)


def test_the_stage_that_has_least_decides(llama: TinyModel) -> None:
    with Ring(llama.package, (1, 3), caches_prefixes=True) as ring:
        expected = run(ring, BEGINNING)
        forgetful = ring.shards[1].cache
        ring.engines[1]._post(setattr, forgetful, "prefixes", PrefixCache(forgetful.pool))
        assert cached_at(ring, BEGINNING) == {0: 64, 1: 0, 2: 64}
        assert run(ring, BEGINNING) == expected
        assert cached_at(ring, BEGINNING) == dict.fromkeys(range(3), 64)


def test_another_head_finds_nothing_even_with_the_same_hashes(llama: TinyModel) -> None:
    with Ring(llama.package, (2,), caches_prefixes=True) as ring:
        run(ring, BEGINNING)
        stranger = MemoryHead(ring.network, bytes([7]) * 32, ring._on_frame, lambda *_: None)
        for index, stage in enumerate(ring.route):
            stranger.connect(stage.node)
            opening = replace(ring.opening(BEGINNING), head=stranger.node, stage_index=index)
            if index == 0:
                hashes = prefix_hashes(opening.model, stranger.node, BEGINNING)
                opening = replace(opening, prefix_hashes=hashes)
            else:
                # A later stage cannot tell whose hashes these are, and need not.
                opening = replace(opening, prompt_ids=())
            heard = ring.heard.setdefault(opening.session, Heard())
            stranger.send(stage.node, opening)
            wait_until(lambda heard=heard: bool(heard.opened))
            assert heard.cached == {index: 0}


BAD: dict[str, tuple[Callable[[OpenSession], OpenSession], str]] = {
    "other ids": (
        lambda o: replace(o, prompt_ids=(3, *o.prompt_ids[1:])),
        "not those of the prompt",
    ),
    "one changed": (
        lambda o: replace(o, prefix_hashes=(bytes(16), *o.prefix_hashes[1:])),
        "not those of the prompt",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_hashes_that_are_not_the_prompts_are_refused(llama: TinyModel, name: str) -> None:
    change, words = BAD[name]
    with Ring(llama.package, (2,), caches_prefixes=True) as ring:
        opening = change(ring.opening(BEGINNING))
        heard = ring.heard.setdefault(opening.session, Heard())
        ring.head.send(ring.route[0].node, opening)
        wait_until(lambda: bool(heard.errors))
        assert heard.errors[0].code is ErrorCode.BAD_FRAME
        assert words in heard.errors[0].message
        assert ring.all_kv_free()


@pytest.mark.parametrize("num_cached_tokens", [80, 2**31])
def test_a_session_does_not_begin_where_nothing_is_cached(llama: TinyModel, num_cached_tokens: int) -> None:
    with Ring(llama.package, (2,), caches_prefixes=True) as ring:
        run(ring, BEGINNING)
        opening = ring.opening([*BEGINNING, *BEGINNING])
        heard = ring.open(opening)
        ring.head.send(opening.route[0].node, StartSession(opening.session, num_cached_tokens))
        wait_until(lambda: bool(heard.errors))
        assert heard.errors[0].code is ErrorCode.BAD_FRAME
        ring.close_session(opening)
        wait_until(ring.all_kv_free)


def test_cached_tokens_are_counted_as_such(llama: TinyModel) -> None:
    with Ring(llama.package, (2,), caches_prefixes=True) as ring:
        run(ring, BEGINNING)
        opening = ring.opening(BEGINNING)
        heard = ring.open(opening)
        ring.start(opening)
        wait_until(lambda: heard.is_over)
        for index in range(2):
            ring.send_receipt(ring.receipt(opening, index, 1, len(BEGINNING), 16, cached=64))
        wait_until(lambda: len(heard.receipts) == 2)
        ring.send_receipt(ring.receipt(opening, 0, 2, len(BEGINNING), 16, cached=70))
        wait_until(lambda: bool(heard.errors))
        assert "num_cached_tokens is 70, the stage counted 64" in heard.errors[0].message
