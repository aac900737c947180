"""The virtual token counter alone: any order of requests, members and weights, a token at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from node.token_counter import TokenCounter

weights = st.lists(st.integers(50, 1000), min_size=2, max_size=6)
MAX_NUM_TOKENS = 20


@dataclass
class Queue:
    """One place: the waiting member with the lowest count is served a whole request, then the next."""

    weights: dict[bytes, int]
    served: Counter[bytes] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.counter = TokenCounter(self.weights.__getitem__)

    def arrive(self, member: bytes, waiting: set[bytes]) -> None:
        if member not in waiting:
            self.counter.lift(member, waiting)

    def serve(self, waiting: set[bytes], num_tokens: int) -> bytes:
        chosen = min(sorted(waiting), key=self.counter.count)
        self.served[chosen] += num_tokens
        self.counter.charge(chosen, num_tokens)
        return chosen


def named(weights: list[int]) -> dict[bytes, int]:
    return {bytes([number]): weight for number, weight in enumerate(weights)}


@settings(max_examples=200, deadline=None)
@given(weights=weights, sizes=st.lists(st.integers(1, MAX_NUM_TOKENS), min_size=50, max_size=400))
def test_backlogged_members_differ_by_one_request_each(weights: list[int], sizes: list[int]) -> None:
    """The bound of the paper: what two got, by weight, is never further apart than their largest requests."""
    queue = Queue(named(weights))
    members = set(queue.weights)
    for size in sizes:
        queue.serve(members, size)
        shares = {member: queue.served[member] / weight for member, weight in queue.weights.items()}
        for one in members:
            for other in members:
                bound = MAX_NUM_TOKENS / min(queue.weights[one], queue.weights[other])
                # Counters are integers.
                assert shares[one] - shares[other] <= bound + 0.01


@settings(max_examples=200, deadline=None)
@given(weights=weights, num_rounds=st.integers(1, 200))
def test_nobody_starves(weights: list[int], num_rounds: int) -> None:
    queue = Queue(named(weights))
    members = set(queue.weights)
    num_since = dict.fromkeys(members, 0)
    # While one waits, each other gets at most its weight's worth of requests more.
    for _ in range(num_rounds):
        chosen = queue.serve(members, 1)
        num_since = {member: 0 if member == chosen else num + 1 for member, num in num_since.items()}
        for member, num in num_since.items():
            others = sum(weight for other, weight in queue.weights.items() if other != member)
            assert num <= others / queue.weights[member] + len(members) + 1


@settings(max_examples=200, deadline=None)
@given(weights=weights, num_before=st.integers(1, 300), num_after=st.integers(1, 60))
def test_who_was_idle_saves_up_nothing(weights: list[int], num_before: int, num_after: int) -> None:
    queue = Queue(named(weights))
    back, others = bytes([0]), set(queue.weights) - {bytes([0])}
    for _ in range(num_before):
        queue.serve(others, 5)
    queue.arrive(back, others)
    before = queue.served.copy()
    for _ in range(num_after):
        queue.serve(others | {back}, 5)
    got = queue.served - before
    for other in others:
        bound = 2 * 5 / min(queue.weights[back], queue.weights[other])
        assert got[back] / queue.weights[back] - got[other] / queue.weights[other] <= bound + 0.01


def test_alone_one_is_lifted_to_who_was_served_last() -> None:
    queue = Queue({b"a": 1000, b"b": 100})
    for _ in range(10):
        queue.serve({b"a"}, 5)
    queue.arrive(b"b", set())
    assert queue.counter.count(b"b") == queue.counter.count(b"a") == 50_000


def test_a_lag_is_kept_up_to_its_bound() -> None:
    queue = Queue({b"a": 1000, b"b": 1000})
    queue.counter.charge(b"a", 1000)
    queue.counter.lift(b"b", {b"a", b"b"}, max_lag=1500)
    assert queue.counter.count(b"b") == 0
    queue.counter.lift(b"b", {b"a", b"b"}, max_lag=400)
    assert queue.counter.count(b"b") == 600_000


def test_a_change_of_weight_counts_from_then_on() -> None:
    weights = {b"a": 1000}
    counter = TokenCounter(weights.__getitem__)
    counter.charge(b"a", 100)
    weights[b"a"] = 100
    counter.charge(b"a", 100)
    assert counter.count(b"a") == 1_100_000


def test_counters_are_bounded() -> None:
    counter = TokenCounter(lambda _: 1000, max_num_members=100)
    for number in range(1000):
        counter.charge(number.to_bytes(2, "big"), 1 + number)
    assert len(counter._counts) <= 100
    assert counter.count((999).to_bytes(2, "big")) == 1_000_000
