"""The index of earlier runs: what it finds is what a search through the whole text finds."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from node.engine.ngram_index import MAX_NUM_SLOTS, MAX_RUN, MIN_RUN, NgramIndex

FEW_IDS = st.lists(st.integers(0, 2), max_size=40)


def searched(ids: Sequence[int], max_num: int) -> tuple[int, tuple[int, ...]]:
    """The newest earlier place of the longest run, found the slow way."""
    for run in range(MAX_RUN, MIN_RUN - 1, -1):
        for place in range(len(ids) - 1, run - 1, -1):
            if list(ids[place - run : place]) == list(ids[len(ids) - run :]):
                text = list(ids)
                while len(text) < len(ids) + max_num:
                    text.append(text[place + len(text) - len(ids)])
                return run, tuple(text[len(ids) :])
    return 0, ()


@given(FEW_IDS, FEW_IDS, st.integers(1, 15))
def test_it_finds_what_a_search_finds(prompt: list[int], output: list[int], max_num: int) -> None:
    # Two runs in one slot would make it find less: of three ids there are too few runs for that.
    index = NgramIndex(prompt, MAX_NUM_SLOTS)
    assert index.following(max_num) == searched(prompt, max_num)
    for number, token_id in enumerate(output, 1):
        index.add(token_id)
        assert index.following(max_num) == searched(prompt + output[:number], max_num)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=60), st.integers(0, 60))
def test_a_prompt_is_indexed_like_tokens_one_by_one(ids: list[int], num_in_prompt: int) -> None:
    ids = ids * 2
    whole, grown = NgramIndex(ids, 300), NgramIndex(ids[:num_in_prompt], 300)
    for token_id in ids[num_in_prompt:]:
        grown.add(token_id)
    assert whole.following(5) == grown.following(5)
    assert whole._places == grown._places


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=400))
def test_when_slots_are_shared_what_it_finds_still_stood_there(ids: list[int]) -> None:
    index = NgramIndex([], 1)
    for token_id in [*ids, *ids]:
        index.add(token_id)
    run, guesses = index.following(1)
    text = [*ids, *ids]
    if run:
        tail = text[-run:]
        places = range(run, len(text))
        assert any(text[p - run : p] == tail and text[p] == guesses[0] for p in places)


def test_a_short_period_goes_on_from_itself() -> None:
    assert NgramIndex([9, 1, 2, 1, 2, 1, 2], 100).following(5) == (4, (1, 2, 1, 2, 1))
    assert NgramIndex([7, 7, 7], 100).following(3) == (2, (7, 7, 7))


def test_texts_too_short_for_a_run() -> None:
    for ids in ([], [1], [1, 1], [1, 2, 3]):
        assert NgramIndex(ids, 10).following(3) == (0, ())


def test_memory_is_bounded_however_long_the_text_may_become() -> None:
    index = NgramIndex(range(1000), 10**9)
    assert index.num_bytes == 4 * (3 * MAX_NUM_SLOTS + 1000)
    assert NgramIndex([], 2048).num_bytes == 4 * 3 * 2048
