"""Whose turn it is: what is kept for whom, and for how long. No engine, made-up time."""

from __future__ import annotations

from node.engine.turns import LATELY_MS, PATIENCE_MS, Asker, Claim, Turns

CACHE, OTHER_CACHE = 1, 2


def asker(member: bytes, claim: Claim = Claim.SHARE, is_replay: bool = False, cache: int = CACHE) -> Asker:
    return Asker(member, claim, is_replay, cache)


def kept(turns: Turns, who: Asker, slots: int, blocks: int, now_ms: int = 0) -> tuple[int, int]:
    return turns.kept_before(who, slots, lambda cache: blocks, now_ms)


def test_room_is_kept_for_the_lower_counter_only() -> None:
    counts = {b"a": 10, b"b": 20}
    turns = Turns(lambda member: counts[member])
    turns.asks(asker(b"a"), 5, 0)
    assert kept(turns, asker(b"b"), 1, 8) == (1, 5)
    turns.asks(asker(b"b"), 5, 0)
    assert kept(turns, asker(b"a"), 1, 8) == (0, 0)
    turns.given(asker(b"a"))
    assert kept(turns, asker(b"b"), 1, 8) == (0, 0)
    # Who is charged comes later.
    counts[b"b"] = 5
    assert kept(turns, asker(b"a"), 1, 8) == (1, 5)


def test_a_claim_goes_before_any_counter() -> None:
    turns = Turns(lambda member: member[0])
    order = [
        asker(b"z", Claim.PREEMPTED),
        asker(b"y", Claim.OWN_MACHINE),
        asker(b"b"),
        asker(b"c"),
        asker(b"a", Claim.PAST_CREDIT_LINE),
    ]
    assert [turns.rank(one) for one in order] == sorted(turns.rank(one) for one in order)


def test_a_replay_that_only_says_so_passes_no_other_member() -> None:
    turns = Turns(lambda member: {b"a": 10, b"b": 20}[member])
    turns.asks(asker(b"a"), 5, 0)
    assert kept(turns, asker(b"b", is_replay=True), 1, 8) == (1, 5)
    turns.given(asker(b"a"))
    turns.asks(asker(b"b", is_replay=True), 5, 0)
    assert kept(turns, asker(b"a"), 1, 8) == (0, 0)
    assert kept(turns, asker(b"b"), 1, 8) == (1, 5)


def test_who_stops_asking_is_forgotten() -> None:
    turns = Turns(lambda member: member[0])
    turns.asks(asker(b"a"), 5, 0)
    assert kept(turns, asker(b"b"), 0, 0, LATELY_MS - 1) == (1, 5)
    assert kept(turns, asker(b"b"), 0, 0, LATELY_MS) == (0, 0)
    assert turns.members(LATELY_MS) == set()


def test_room_that_is_not_taken_goes_to_the_next() -> None:
    """Its head may be waiting for another stage, which keeps its room for the one that waits here."""
    turns = Turns(lambda member: member[0])
    turns.asks(asker(b"a"), 5, 0)
    assert kept(turns, asker(b"b"), 1, 8, 0) == (1, 5)
    turns.asks(asker(b"a"), 5, PATIENCE_MS)
    assert kept(turns, asker(b"b"), 1, 8, PATIENCE_MS) == (1, 5)
    assert kept(turns, asker(b"b"), 1, 8, PATIENCE_MS + 1) == (0, 0)
    # When it is gone and comes back, the first is first again.
    assert kept(turns, asker(b"b"), 0, 3, PATIENCE_MS + 2) == (1, 5)
    assert kept(turns, asker(b"b"), 1, 8, PATIENCE_MS + 3) == (1, 5)


def test_a_big_request_gathers_blocks_for_as_long_as_it_takes() -> None:
    turns = Turns(lambda member: member[0])
    for now_ms in range(0, 5000, 100):
        turns.asks(asker(b"a"), 50, now_ms)
        assert kept(turns, asker(b"b"), 4, 40, now_ms) == (1, 50)


def test_another_models_cache_keeps_places_but_no_blocks_of_this_one() -> None:
    turns = Turns(lambda member: member[0])
    turns.asks(asker(b"a", cache=OTHER_CACHE), 5, 0)
    assert kept(turns, asker(b"b"), 1, 8) == (1, 0)
    # Without blocks there a place is of no use to it.
    assert kept(turns, asker(b"b"), 1, 4) == (0, 0)
