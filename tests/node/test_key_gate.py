"""A key's cap and its limits per minute: at one gateway, at two that see each other, at two that do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ledger.entry import HoldVoided, VoidReason
from ledger.ledger import Ledger
from node.gateway.backend import Caller, QuotaExceeded, RateLimited
from node.key_gate import Admission, KeyGate
from node.sliding_minute import ASK_AGAIN_MS, MINUTE_MS, SlidingMinute
from tests.ledger.world import KEY, START_MS, World, raws, session_id

WORTH = 10
"""Microcredits that a request may cost, and here does."""


class Gateway:
    """One node's gate over its own ledger; sessions are numbered so that no two gateways use the same."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.ledger: Ledger = world.ledger(number)
        self.gate = KeyGate(self.ledger, world.clock)
        self._num_sessions = 0

    def open(self, caller: Caller, amount: int = WORTH, num_tokens: int = 30) -> tuple[Admission, bytes]:
        """Admit and hold. Raises what the gate raises."""
        admission = self.gate.admit(caller, num_tokens, amount)
        self._num_sessions += 1
        session = session_id(1000 * self.number + self._num_sessions)
        hold = self.world.hold(session, payer=0, amount_microcredits=amount, head=self.number)
        self.ledger.append(hold)
        admission.held()
        return admission, session

    def ask(self, caller: Caller, amount: int = WORTH, num_tokens: int = 30) -> int:
        """A whole request that costs what it holds; returns that."""
        admission, session = self.open(caller, amount, num_tokens)
        receipt = self.world.receipt(
            session,
            head=self.number,
            stage=2,
            num_parameters=amount * 1000,
            num_prompt_tokens=0,
            num_output_tokens=1,
        )
        self.ledger.append(self.world.settlement(session, receipt))
        admission.end(num_tokens)
        return receipt.amount_microcredits

    def ask_until_refused(self, caller: Caller, amount: int = WORTH) -> int:
        spent = 0
        while True:
            try:
                spent += self.ask(caller, amount)
            except QuotaExceeded:
                return spent

    def hear(self, other: Gateway) -> None:
        self.ledger.ingest(raws(other.ledger))


@pytest.fixture
def world() -> World:
    return World()


def key(world: World, **limits: int) -> Caller:
    return replace(Caller(world.members[0], "ada", KEY), **limits)  # type: ignore[arg-type]


def test_a_cap_covers_what_is_spent_held_and_asked_for(world: World) -> None:
    gateway, caller = Gateway(world, 0), key(world, cap_microcredits=35)
    assert gateway.ask(caller) == WORTH
    held, session = gateway.open(caller)
    waiting = gateway.gate.admit(caller, 30, WORTH)
    with pytest.raises(QuotaExceeded) as refused:
        gateway.gate.admit(caller, 30, 6)
    for number in ("0.000035", "0.000010 are spent", "0.000020 are held", "up to 0.000006"):
        assert number in str(refused.value)
    assert "\n" not in str(refused.value)
    gateway.gate.admit(caller, 30, 5).cancel()
    waiting.cancel()
    gateway.ledger.append(HoldVoided(session, VoidReason.CANCELLED))
    held.end(0)
    gateway.gate.admit(caller, 30, 25)


def test_requests_at_the_same_moment_do_not_share_what_is_left(world: World) -> None:
    gateway, caller = Gateway(world, 0), key(world, cap_microcredits=35)
    admitted = [gateway.gate.admit(caller, 30, WORTH) for _ in range(3)]
    with pytest.raises(QuotaExceeded):
        gateway.gate.admit(caller, 30, WORTH)
    for admission in admitted:
        admission.end(0)
        admission.end(0)
    gateway.gate.admit(caller, 30, 35)


def test_a_key_without_limits_is_never_refused(world: World) -> None:
    gateway, caller = Gateway(world, 0), key(world)
    for _ in range(50):
        gateway.ask(caller)
    assert gateway.gate.rate_limits(caller) == ()


def test_gateways_that_see_each_other_let_a_key_spend_its_cap_once(world: World) -> None:
    first, second, caller = Gateway(world, 0), Gateway(world, 1), key(world, cap_microcredits=35)
    first.ask(caller)
    second.hear(first)
    second.ask(caller)
    _, _ = second.open(caller)
    first.hear(second)
    with pytest.raises(QuotaExceeded):
        first.ask(caller)


def test_gateways_that_do_not_see_each_other_let_it_spend_its_cap_once_each(world: World) -> None:
    """The bound in the docs: the cap times the gateways (or sides of a partition), exactly, not more."""
    cap = 95
    gateways = [Gateway(world, number) for number in range(3)]
    caller = key(world, cap_microcredits=cap)
    before = gateways[0].ask(caller)
    for gateway in gateways[1:]:
        gateway.hear(gateways[0])
    spent = [gateway.ask_until_refused(caller) for gateway in gateways]
    assert all(before + one <= cap for one in spent)
    assert before + sum(spent) == WORTH + 3 * 80
    assert before + sum(spent) <= len(gateways) * cap
    for gateway in gateways:
        for other in gateways:
            gateway.hear(other)
    for gateway in gateways:
        assert gateway.ledger.key_spent_microcredits(world.members[0], KEY) == before + sum(spent)
        with pytest.raises(QuotaExceeded):
            gateway.ask(caller, amount=1)


def test_a_partition_between_two_pairs_costs_one_cap_per_side(world: World) -> None:
    sides = [Gateway(world, 0), Gateway(world, 1)], [Gateway(world, 2)]
    caller = key(world, cap_microcredits=100)
    spent = 0
    for side in sides:
        for gateway in side:
            for other in side:
                gateway.hear(other)
            spent += gateway.ask_until_refused(caller)
    assert spent == 200


def test_requests_per_minute_slide(world: World) -> None:
    gateway, caller = Gateway(world, 0), key(world, max_num_requests_per_minute=2)
    gateway.ask(caller)
    world.clock.now_ms += 20_000
    gateway.ask(caller)
    (limit,) = gateway.gate.rate_limits(caller)
    assert (limit.unit, limit.limit, limit.remaining, limit.reset_ms) == ("requests", 2, 0, MINUTE_MS)
    world.clock.now_ms += 500
    with pytest.raises(RateLimited) as refused:
        gateway.ask(caller)
    assert (refused.value.unit, refused.value.retry_after_s) == ("requests", 40)
    assert "2 requests per minute" in str(refused.value)
    world.clock.now_ms += 39_500
    gateway.ask(caller)
    with pytest.raises(RateLimited) as refused:
        gateway.ask(caller)
    assert refused.value.retry_after_s == 20


def test_a_request_that_never_began_does_not_count(world: World) -> None:
    gateway = Gateway(world, 0)
    caller = key(world, max_num_requests_per_minute=1, max_num_tokens_per_minute=40)
    gateway.gate.admit(caller, 30, WORTH).cancel()
    gateway.ask(caller)
    with pytest.raises(RateLimited):
        gateway.ask(caller)


def test_tokens_count_as_they_may_be_while_running_and_as_they_were_after(world: World) -> None:
    gateway, caller = Gateway(world, 0), key(world, max_num_tokens_per_minute=100)
    running, _ = gateway.open(caller, num_tokens=80)
    with pytest.raises(RateLimited) as refused:
        gateway.gate.admit(caller, 30, WORTH)
    assert refused.value.retry_after_s == ASK_AGAIN_MS // 1000
    world.clock.now_ms += 2 * MINUTE_MS
    with pytest.raises(RateLimited):
        gateway.gate.admit(caller, 30, WORTH)
    running.end(70)
    gateway.gate.admit(caller, 30, WORTH).end(10)
    (limit,) = gateway.gate.rate_limits(caller)
    assert (limit.unit, limit.limit, limit.remaining, limit.reset_ms) == ("tokens", 100, 20, MINUTE_MS)
    world.clock.now_ms += MINUTE_MS - 1
    with pytest.raises(RateLimited) as refused:
        gateway.gate.admit(caller, 100, WORTH)
    assert refused.value.retry_after_s == 1
    world.clock.now_ms += 1
    gateway.gate.admit(caller, 100, WORTH)


def test_an_ending_nobody_counted_uses_all_it_might_have(world: World) -> None:
    gateway, caller = Gateway(world, 0), key(world, max_num_tokens_per_minute=100)
    gateway.gate.admit(caller, 80, WORTH).end()
    assert gateway.gate.rate_limits(caller)[0].remaining == 20


def test_a_request_larger_than_the_limit_will_never_fit(world: World) -> None:
    gateway, caller = Gateway(world, 0), key(world, max_num_tokens_per_minute=100)
    with pytest.raises(RateLimited, match="may use 101") as refused:
        gateway.gate.admit(caller, 101, WORTH)
    assert refused.value.retry_after_s is None


def test_limits_per_minute_cover_what_the_ledger_shows_of_other_gateways(world: World) -> None:
    first, second = Gateway(world, 0), Gateway(world, 1)
    caller = key(world, max_num_requests_per_minute=2, max_num_tokens_per_minute=100)
    first.ask(caller)
    second.ask(caller)
    assert [limit.remaining for limit in first.gate.rate_limits(caller)] == [1, 70]
    first.hear(second)
    # One token was settled there: the ledger's count, not the other gateway's estimate.
    assert [limit.remaining for limit in first.gate.rate_limits(caller)] == [0, 69]
    with pytest.raises(RateLimited):
        first.ask(caller)
    world.clock.now_ms += MINUTE_MS
    assert [limit.remaining for limit in first.gate.rate_limits(caller)] == [2, 100]


def test_a_gateway_whose_clock_is_hours_ahead_blocks_no_key(world: World) -> None:
    first, second = Gateway(world, 0), Gateway(world, 1)
    caller = key(world, max_num_requests_per_minute=1)
    world.clock.now_ms = START_MS + 3_600_000
    second.ask(caller)
    world.clock.now_ms = START_MS
    first.hear(second)
    first.ask(caller)


def test_a_gateway_that_restarts_remembers_the_minute(world: World) -> None:
    gateway = Gateway(world, 0)
    caller = key(world, max_num_requests_per_minute=2, max_num_tokens_per_minute=100, cap_microcredits=1000)
    gateway.ask(caller)
    world.clock.now_ms += 1000
    gateway.gate = KeyGate(gateway.ledger, world.clock)
    assert [limit.remaining for limit in gateway.gate.rate_limits(caller)] == [1, 99]
    gateway.ask(caller)
    assert [limit.remaining for limit in gateway.gate.rate_limits(caller)] == [0, 69]


def test_keys_and_members_are_kept_apart(world: World) -> None:
    gateway, caller = Gateway(world, 0), key(world, max_num_requests_per_minute=1)
    gateway.gate.admit(caller, 30, WORTH)
    gateway.gate.admit(replace(caller, key_id=b"other".ljust(16)), 30, WORTH)
    gateway.gate.admit(replace(caller, member=world.members[1]), 30, WORTH)
    with pytest.raises(RateLimited):
        gateway.gate.admit(caller, 30, WORTH)


@pytest.mark.parametrize(
    ("used", "running", "amount", "wait_ms"),
    [
        ((), 0, 10, 0),
        ((), 0, 11, None),
        (((0, 4), (5, 6)), 0, 3, MINUTE_MS - 10),
        (((0, 4), (5, 6)), 0, 5, MINUTE_MS - 5),
        (((0, 4),), 6, 7, ASK_AGAIN_MS),
        (((0, 4),), 6, 4, MINUTE_MS - 10),
    ],
)
def test_a_wait_ends_when_enough_is_a_minute_old(
    used: tuple[tuple[int, int], ...], running: int, amount: int, wait_ms: int | None
) -> None:
    assert SlidingMinute(10, used, running).wait_ms(amount, now_ms=10) == wait_ms
