"""Members and their gateways before one engine and before a ring of them: shares, cheats, the owner's own."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import pytest

from ledger.entry import HoldOpened
from ledger.rate_card import DEFAULT_RATE_CARD
from node.engine.admission import Admission, Candidate
from node.engine.fair_share import FairShare
from node.engine.messages import MemberStanding
from node.engine.opening import NoRoom, Refusal
from node.engine.room import make_room
from node.engine.scheduler import StepLimits, schedule
from node.engine.session import StageSession
from node.engine.session_book import SessionBook
from node.engine.turns import LATELY_MS
from node.engine.waiting_room import MAX_NUM_WAITING_PER_HEAD, WaitingRoom
from node.links.frames import ErrorCode, OpenSession, Sampling
from node.sessions.authorization import authorize
from node.sessions.terms import HOLD_GRACE_S
from node.sessions.waiting_line import MAX_NUM_ASKING_OF_LINE
from pod.api_key import delegate
from pod.identity import KeyPair
from tests.engine.ring import GREEDY, POD, Ring, wait_until
from tests.engine.test_scheduler import MANIFEST, NODE, WHOLE, make_loaded
from tests.engine.tiny import TinyModel

STEP_MS = 10
PROMPT_TOKENS = 4
OWNER = b"O" * 32


def member(number: int) -> bytes:
    return bytes([number]) * 32


def node_of(member: bytes) -> bytes:
    return member[:16] + b"node".ljust(16)


def standing(member: bytes, weight: int, is_past_line: bool = False) -> MemberStanding:
    return MemberStanding(member, weight, is_past_line, (node_of(member),))


@dataclass
class Gateway:
    """A head that always wants `num_wanted` more sessions of its member. Greedy ones ask at every step, for
    many at once, and say that all are replays."""

    member: bytes
    num_wanted: int = 4
    is_greedy: bool = False
    num_tokens: int = 8
    num_asking: int = 0
    next_ms: int = 0


@dataclass
class Stage:
    """One engine's bookkeeping, with so many places; a session takes a step per token."""

    num_places: int
    standings: list[MemberStanding]
    num_blocks: int = 400
    limits: StepLimits = field(default_factory=StepLimits)
    now_ms: int = 1000
    received: Counter[bytes] = field(default_factory=Counter)
    num_running: Counter[bytes] = field(default_factory=Counter)
    num_idle_places: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(7)
        self.book = SessionBook()
        self.loaded = make_loaded(self.num_blocks)
        self.fair_share = FairShare(NODE, POD, lambda: self.now_ms)
        self.fair_share.set_standings([*self.standings, MemberStanding(OWNER, 100, False, (NODE,))])
        self.admission = Admission(
            NODE,
            POD,
            self.book,
            [self.loaded],
            {1: DEFAULT_RATE_CARD},
            lambda: self.now_ms,
            self.fair_share,
            self.num_places,
        )
        self.waiting_room = WaitingRoom()
        self.gateways: dict[bytes, Gateway] = {}
        self.asking: dict[bytes, Gateway] = {}
        self.num_opened = 0

    def opening(self, gateway: Gateway, head: bytes | None = None) -> OpenSession:
        self.num_opened += 1
        num_before = 2 if gateway.is_greedy else 0
        return OpenSession(
            session=self.num_opened.to_bytes(16, "big"),
            model=MANIFEST.model_id,
            route=WHOLE,
            stage_index=0,
            head=head or (NODE if gateway.member == OWNER else node_of(gateway.member)),
            payer=gateway.member,
            key_id=bytes(16),
            hold_microcredits=1,
            num_prompt_tokens=PROMPT_TOKENS,
            sampling=Sampling(max_num_output_tokens=gateway.num_tokens + num_before),
            deadline_ms=2**50,
            rate_card_version=1,
            num_output_tokens_before=num_before,
            prompt_ids=(1,) * PROMPT_TOKENS,
        )

    def run(self, gateways: list[Gateway], num_steps: int) -> None:
        for _ in range(num_steps):
            self.now_ms += STEP_MS
            for gateway in gateways:
                self.let_ask(gateway)
            self.admit_waiting()
            wanted = sum(g.num_wanted for g in gateways)
            if wanted > self.num_places:
                self.num_idle_places += self.num_places - len(self.book.sessions)
            self.step()

    def let_ask(self, gateway: Gateway) -> None:
        num_at_once = 16 if gateway.is_greedy else MAX_NUM_ASKING_OF_LINE
        while (
            gateway.num_asking < num_at_once
            and self.num_running[gateway.member] + gateway.num_asking < gateway.num_wanted
            and (gateway.is_greedy or self.now_ms >= gateway.next_ms)
        ):
            opening = self.opening(gateway)
            candidate = self.admission.check(opening.head, opening)
            try:
                self.opened(self.admission.take(candidate), gateway)
            except NoRoom:
                if not self.waiting_room.add(candidate, self.now_ms):
                    return
                gateway.num_asking += 1
                self.asking[opening.session] = gateway

    def admit_waiting(self) -> None:
        refused = self.waiting_room.admit(
            self.let_in, self.admission.rank, self.now_ms, self.book.num_quieted
        )
        for candidate, _ in refused:
            gateway = self.asking.pop(candidate.opening.session)
            gateway.num_asking -= 1
            gateway.next_ms = self.now_ms + self.rng.randrange(50, 150)

    def let_in(self, candidate: Candidate) -> None:
        session = self.admission.take(candidate)
        gateway = self.asking.pop(session.id)
        gateway.num_asking -= 1
        self.opened(session, gateway)

    def opened(self, session: StageSession, gateway: Gateway) -> None:
        self.gateways[session.id] = gateway
        self.book.add(session)
        self.num_running[gateway.member] += 1
        ids = (1,) * session.num_prompt_tokens
        session.push(0, len(ids), ids, 0, 0.0)
        self.book.make_ready(session)

    def step(self) -> None:
        groups = self.book.groups.values()
        batch = schedule(self.book.ready, groups, self.limits, lambda _: True, self.fair_share.rank)
        for part in batch:
            del self.book.ready[part.session]
        assert make_room(batch, self.book.sessions.values()) == []
        self.fair_share.charge(batch)
        for part in batch:
            session, gateway = part.session, self.gateways[part.session.id]
            if part.end < session.num_prompt_tokens:
                self.book.make_ready(session)
                continue
            self.received[gateway.member] += 1
            if part.end - session.num_prompt_tokens + 1 == gateway.num_tokens:
                self.book.remove(session)
                self.loaded.cache.close(session.table)
                self.num_running[gateway.member] -= 1
            else:
                session.push(part.end, 1, (1,), 0, 0.0)
                self.book.make_ready(session)


def shares(stage: Stage, gateways: list[Gateway]) -> dict[bytes, float]:
    """What each got, for its weight, compared with all."""
    weights = {one.member: one.weight_per_mille for one in stage.standings}
    total = sum(stage.received[g.member] for g in gateways)
    total_weight = sum(weights[g.member] for g in gateways)
    return {g.member: stage.received[g.member] / total / (weights[g.member] / total_weight) for g in gateways}


@pytest.mark.parametrize("num_places", [1, 3, 8])
def test_ten_members_get_what_they_weigh(num_places: int) -> None:
    members = [member(number) for number in range(1, 11)]
    stage = Stage(num_places, [standing(one, 100 * number) for number, one in enumerate(members, 1)])
    gateways = [Gateway(one, num_wanted=6) for one in members]
    stage.run(gateways, 20_000 // num_places)
    for share in shares(stage, gateways).values():
        assert 0.95 < share < 1.05
    # Work-conserving: hardly ever is a place kept for who is about to ask again.
    assert stage.num_idle_places < 0.002 * 20_000


def test_a_gateway_that_asks_all_the_time_for_much_gains_nothing() -> None:
    members = [member(number) for number in range(1, 7)]
    stage = Stage(4, [standing(one, 500) for one in members])
    gateways = [Gateway(one, num_wanted=40 if one == members[0] else 4) for one in members]
    gateways[0].is_greedy = True
    stage.run(gateways, 10_000)
    assert shares(stage, gateways)[members[0]] < 1.02


def test_long_requests_and_short_ones_count_by_their_tokens() -> None:
    members = [member(1), member(2)]
    stage = Stage(2, [standing(one, 500) for one in members])
    gateways = [Gateway(members[0], num_tokens=60), Gateway(members[1], num_tokens=4)]
    stage.run(gateways, 20_000)
    computed = {g.member: stage.received[g.member] * (1 + PROMPT_TOKENS / g.num_tokens) for g in gateways}
    # The first output token comes of the prompt's last row.
    assert 0.8 < computed[members[0]] / computed[members[1]] < 1.25


def test_alone_the_least_of_all_gets_everything() -> None:
    poor, rich = member(1), member(2)
    stage = Stage(4, [standing(poor, 1, is_past_line=True), standing(rich, 1000)])
    stage.run([Gateway(poor, num_wanted=4)], 100)
    alone = stage.received[poor]
    assert alone >= 4 * 95
    # And is not made to pay for it when others come.
    stage.run([Gateway(poor, num_wanted=4), Gateway(rich, num_wanted=4)], 1)


def test_who_comes_back_gets_its_share_and_no_arrears() -> None:
    first, second = member(1), member(2)
    stage = Stage(2, [standing(first, 500), standing(second, 500)])
    busy, idle = Gateway(first), Gateway(second)
    stage.run([busy], 3000)
    stage.received.clear()
    stage.run([busy, idle], 1000)
    assert 0.9 < stage.received[second] / stage.received[first] < 1.1


def test_past_the_credit_line_one_is_served_when_nobody_else_asks() -> None:
    past, other = member(1), member(2)
    stage = Stage(2, [standing(past, 100, is_past_line=True), standing(other, 100)])
    gateways = [Gateway(past), Gateway(other)]
    stage.run(gateways, 2000)
    assert stage.received[past] < 0.1 * stage.received[other]
    stage.run(gateways[:1], 500)
    assert stage.received[past] >= 900


def test_the_owner_comes_first_on_its_own_machine() -> None:
    guest = member(1)
    stage = Stage(2, [standing(guest, 1000)])
    owner = Gateway(OWNER, num_wanted=1)
    stage.run([Gateway(guest, num_wanted=6), owner], 2000)
    # One of the two places at a time is all that it wanted, and but for a wait at each beginning it had it.
    assert stage.received[OWNER] > 0.4 * stage.received[guest]
    assert stage.received[guest] > 0.4 * stage.received[OWNER]


def test_who_names_another_payer_must_show_that_it_may() -> None:
    payer_key = KeyPair.of_seed(bytes([9]) * 32)
    cheat, payer = member(1), payer_key.public
    stage = Stage(2, [standing(cheat, 500), standing(payer, 1000)])
    head = node_of(cheat)
    opening = stage.opening(Gateway(payer), head=head)
    with pytest.raises(Refusal, match="has not let this head charge it"):
        stage.admission.admit(head, opening)
    key, delegation = delegate(POD, payer, payer_key.sign, "laptop", 1)
    hold = HoldOpened(
        opening.session,
        payer,
        delegation.key_id,
        opening.model,
        opening.hold_microcredits,
        opening.deadline_ms + HOLD_GRACE_S * 1000,
        1,
    )
    shown = authorize(delegation, key.sign, head, hold)
    allowed = replace(opening, key_id=delegation.key_id, authorization=shown)
    assert stage.admission.admit(head, allowed).payer == payer
    # For this session of this head only.
    for other in (replace(allowed, session=bytes(16)), replace(allowed, hold_microcredits=2)):
        with pytest.raises(Refusal, match="has not let"):
            stage.admission.check(head, other)
    stranger = replace(allowed, payer=b"?" * 32)
    with pytest.raises(Refusal, match="has not let"):
        stage.admission.check(head, stranger)


def test_waiting_is_bounded_and_ends_with_its_head() -> None:
    one = member(1)
    stage = Stage(1, [standing(one, 500)])
    gateway = Gateway(one, num_wanted=500, is_greedy=True)
    take = partial(stage.admission.check, node_of(one))
    stage.let_ask(replace(gateway, num_wanted=1))
    candidates: list[Candidate] = [take(stage.opening(gateway)) for _ in range(MAX_NUM_WAITING_PER_HEAD + 1)]
    added = [stage.waiting_room.add(candidate, stage.now_ms) for candidate in candidates]
    assert added == [True] * MAX_NUM_WAITING_PER_HEAD + [False]
    stage.waiting_room.remove(node_of(one), candidates[0].opening.session)
    assert len(stage.waiting_room) == MAX_NUM_WAITING_PER_HEAD - 1
    stage.waiting_room.remove(b"somebody else".ljust(32), candidates[1].opening.session)
    assert len(stage.waiting_room) == MAX_NUM_WAITING_PER_HEAD - 1
    stage.waiting_room.remove(node_of(one))
    assert not stage.waiting_room
    stage.now_ms += LATELY_MS
    assert stage.fair_share.turns.members(stage.now_ms) == set()


@pytest.fixture
def ring(llama: TinyModel) -> Iterator[Ring]:
    with Ring(llama.package, (2,), max_num_sessions=1) as made:
        yield made


def test_whoever_waits_is_let_in_when_the_place_is_free(ring: Ring) -> None:
    """In real engines, without being asked again."""
    prompt = [5, 9, 17]
    first, second = ring.opening(prompt, GREEDY), ring.opening(prompt, GREEDY)
    assert not ring.open(first).errors
    ring.send_opening(second, 0)
    ring.close_session(first)
    ring.send_opening(second, 1)
    heard = ring.heard[second.session]
    wait_until(lambda: len(heard.opened) == 2)
    assert not heard.errors
    ring.start(second)
    wait_until(lambda: heard.is_over)
    ring.close_session(second)
    wait_until(ring.all_kv_free)


def test_whoever_waits_too_long_is_refused_with_the_reason(ring: Ring) -> None:
    first, second = ring.opening([5], GREEDY), ring.opening([5], GREEDY)
    assert not ring.open(first).errors
    heard = ring.open(second)
    assert {error.code for error in heard.errors} == {ErrorCode.NO_KV_ROOM}
    assert "0 of 1 places are free" in heard.errors[0].message
    for opening in (first, second):
        ring.close_session(opening)
    wait_until(ring.all_kv_free)
