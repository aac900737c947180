"""Scheduler, admission and room together, without a model: thousands of random arrivals, step by step."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.rate_card import DEFAULT_RATE_CARD
from node.engine.admission import Admission
from node.engine.kv_cache import BLOCK_TOKENS, KvCache
from node.engine.loaded import LoadedShard
from node.engine.opening import Refusal
from node.engine.pace import Pace
from node.engine.prefix_hashes import prefix_hashes
from node.engine.room import make_room
from node.engine.scheduler import StepLimits, schedule, seconds_beside_decodes
from node.engine.session import Slice, StageSession
from node.engine.session_book import SessionBook
from node.engine.shard import Shard
from node.links.frames import ErrorCode, OpenSession, Sampling, Stage
from node.models.manifest import FileDigest, Manifest
from node.speed import Speed

NODE, HEAD, OTHER = b"n" * 32, b"h" * 32, b"o" * 32
MANIFEST = Manifest(
    name="small",
    model_type="llama",
    hidden_size=2,
    vocab_size=1000,
    max_context_tokens=4096,
    dtype="float32",
    weights=(FileDigest("model.safetensors", 1, bytes(32)),),
    bundle=(),
    layer_num_parameters=(1, 1),
    embedding_num_parameters=1,
    head_num_parameters=1,
    num_kv_values_per_token_per_layer=2,
    eos_token_ids=(0,),
)
WHOLE = (Stage(NODE, "x:1", 0, 2),)
SPLIT = (Stage(NODE, "x:1", 0, 1), Stage(OTHER, "x:1", 1, 2))


@dataclass(eq=False)
class Request:
    """`arrival` is the step it comes in; `beginning` is shared with others of the same number.

    `num_cached_elsewhere` tokens are the most that other stages have of it.
    """

    arrival: int
    beginning: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_elsewhere: int = 1000
    num_output: int = 0
    session: StageSession | None = None
    waited: int = 0
    num_preempted: int = 0

    @property
    def prompt_ids(self) -> list[int]:
        """Earlier output included."""
        shared = [self.beginning] * (self.num_prompt_tokens * 2 // 3)
        own = [id(self) % 997] * (self.num_prompt_tokens - len(shared))
        return shared + own + [1] * self.num_output


def make_loaded(num_blocks: int) -> LoadedShard:
    shard = SimpleNamespace(start_layer=0, end_layer=2)
    cache = KvCache(0, 2, num_blocks, 1, 1, torch.float32, torch.device("cpu"))
    return LoadedShard(
        MANIFEST.model_id, MANIFEST, cast(Shard, shard), cache, 0, 0, Speed((500,) * 3, (6400, 25600))
    )


@dataclass
class World:
    """One engine's bookkeeping: a pass computes nothing, the output comes back after `delay` steps."""

    num_blocks: int
    limits: StepLimits
    route: tuple[Stage, ...] = WHOLE
    delay: int = 0
    step: int = 0
    book: SessionBook = field(default_factory=SessionBook)
    requests: dict[bytes, Request] = field(default_factory=dict)
    coming: deque[tuple[int, StageSession, int]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.loaded = make_loaded(self.num_blocks)
        cards = {1: DEFAULT_RATE_CARD}
        self.admission = Admission(NODE, bytes(32), self.book, [self.loaded], cards, lambda: self.step * 50)

    def open(self, request: Request) -> None:
        ids = request.prompt_ids
        opening = OpenSession(
            session=len(self.requests).to_bytes(16, "big"),
            model=MANIFEST.model_id,
            route=self.route,
            stage_index=0,
            head=HEAD,
            payer=bytes(32),
            key_id=bytes(16),
            hold_microcredits=0,
            num_prompt_tokens=len(ids),
            sampling=Sampling(max_num_output_tokens=request.num_output_tokens),
            deadline_ms=2**50,
            rate_card_version=1,
            num_output_tokens_before=request.num_output,
            prompt_ids=ids,
            prefix_hashes=prefix_hashes(MANIFEST.model_id, HEAD, ids),
        )
        session = self.admission.admit(HEAD, opening)
        self.requests[session.id] = request
        request.session = session
        self.book.add(session)
        # Another stage may have less in its cache.
        start = min(session.num_cached_tokens, request.num_cached_elsewhere)
        session.push(start, len(ids) - start, ids, start, 0.0)
        self.book.make_ready(session)

    def try_to_open(self, request: Request) -> None:
        try:
            self.open(request)
        except Refusal as refusal:
            if refusal.code is not ErrorCode.NO_KV_ROOM:
                raise

    def run(self) -> list[Slice]:
        """One step, as the engine makes it."""
        self.step += 1
        while self.coming and self.coming[0][0] <= self.step:
            _, session, position = self.coming.popleft()
            if session.id in self.book.sessions and not session.is_set_aside:
                session.push(position, 1, (1,), 0, 0.0)
                self.book.make_ready(session)
        seconds = seconds_beside_decodes(self.book.groups.values())
        batch = schedule(self.book.ready, self.book.groups.values(), self.limits, lambda _: True)
        self.check_budgets(batch, seconds)
        for part in batch:
            del self.book.ready[part.session]
        for session in make_room(batch, self.book.sessions.values()):
            self.preempted(session)
        batch = [part for part in batch if not part.session.is_set_aside]
        self.check_blocks(batch)
        for part in batch:
            self.ran(part)
        return batch

    def ran(self, part: Slice) -> None:
        session = part.session
        session.cache_prompt_blocks(part.end)
        if part.end >= session.num_prompt_tokens:
            request = self.requests[session.id]
            request.num_output += 1
            if request.num_output == request.num_output_tokens:
                self.close(session)
                return
            self.coming.append((self.step + self.delay, session, part.end))
        if session.waiting:
            self.book.make_ready(session)

    def preempted(self, session: StageSession) -> None:
        request = self.requests[session.id]
        self.book.remove(session)
        request.session = None
        request.num_preempted += 1

    def close(self, session: StageSession) -> None:
        self.book.remove(session)
        self.loaded.cache.close(session.table)

    def check_budgets(self, batch: list[Slice], seconds: float | None) -> None:
        sessions = [part.session for part in batch]
        assert len(set(sessions)) == len(sessions)
        chunks = [part for part in batch if part.position < part.session.num_prompt_tokens]
        num_prefill = sum(part.num_tokens for part in chunks)
        assert len(batch) - len(chunks) <= self.limits.max_num_decode_sessions
        assert num_prefill <= self.limits.max_num_prefill_tokens
        if seconds is not None and chunks:
            per_token_s = chunks[0].session.group.pace.prefill_s_per_token
            assert num_prefill <= max(self.limits.min_num_prefill_tokens, seconds / per_token_s)

    def check_blocks(self, batch: list[Slice]) -> None:
        """References are the tables'; what a step writes is nobody else's; all of it has room."""
        held = Counter(block for session in self.book.sessions.values() for block in session.table.blocks)
        pool = self.loaded.cache.pool
        assert all(pool.num_references(block) == held[block] for block in range(pool.num_blocks))
        for part in batch:
            blocks = part.session.table.blocks
            assert part.end <= len(blocks) * BLOCK_TOKENS
            written = blocks[part.position // BLOCK_TOKENS : (part.end - 1) // BLOCK_TOKENS + 1]
            assert all(pool.num_references(block) == 1 for block in written)


requests_strategy = st.lists(
    st.builds(
        Request,
        arrival=st.integers(0, 60),
        beginning=st.integers(1, 3),
        num_prompt_tokens=st.integers(1, 90),
        num_output_tokens=st.integers(1, 40),
        num_cached_elsewhere=st.sampled_from([0, 16, 32, 1000]),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(
    requests=requests_strategy,
    num_blocks=st.integers(9, 40),
    max_num_prefill_tokens=st.integers(1, 64),
    max_num_decode_sessions=st.integers(1, 12),
    delay=st.integers(0, 3),
    is_split=st.booleans(),
)
def test_all_are_served_within_budgets_and_no_block_is_lost(
    requests: list[Request],
    num_blocks: int,
    max_num_prefill_tokens: int,
    max_num_decode_sessions: int,
    delay: int,
    is_split: bool,
) -> None:
    limits = StepLimits(max_num_decode_sessions, max_num_prefill_tokens, min(8, max_num_prefill_tokens))
    world = World(num_blocks, limits, SPLIT if is_split else WHOLE, delay)
    waiting = sorted(requests, key=lambda request: request.arrival)
    # Slower than every token in a step of its own and each request recomputed a few times cannot be.
    num_tokens = sum(request.num_prompt_tokens + 2 * request.num_output_tokens for request in requests)
    while waiting or world.book.sessions:
        for request in list(waiting):
            if request.arrival <= world.step and request.session is None:
                world.try_to_open(request)
        world.run()
        waiting = [r for r in requests if r.session is None and r.num_output < r.num_output_tokens]
        assert world.step < 70 + (delay + 1) * 8 * num_tokens, "somebody starves"
    assert all(request.num_output == request.num_output_tokens for request in requests)
    assert world.loaded.cache.num_free_tokens == world.loaded.cache.num_tokens
    assert all(group.num_sessions == group.num_decoding == 0 for group in world.book.groups.values())


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 200), min_size=2, max_size=10), num_decoding=st.integers(0, 6))
def test_nobody_waits_longer_than_a_round(lengths: list[int], num_decoding: int) -> None:
    world = World(400, StepLimits(max_num_decode_sessions=3, max_num_prefill_tokens=16))
    for _ in range(num_decoding):
        world.open(Request(0, 1, 1, 300))
    for length in lengths:
        world.open(Request(0, 2, length, 300))
    num_sessions = num_decoding + len(lengths)
    last_ran = dict.fromkeys(world.book.sessions.values(), 0)
    for _ in range(100):
        for part in world.run():
            last_ran[part.session] = world.step
        assert min(last_ran.values()) >= world.step - num_sessions


def test_beside_decodes_a_chunk_takes_a_share_of_their_time() -> None:
    world = World(400, StepLimits())
    for _ in range(16):
        world.open(Request(0, 1, 1, 300))
    world.run()
    (group,) = world.book.groups.values()
    assert group.num_decoding == 0
    world.run()
    assert group.num_decoding == 16
    group.pace = Pace(decode_s=0.010, prefill_s_per_token=0.0005)
    world.open(Request(0, 2, 900, 10))
    sizes = Counter(part.num_tokens for part in world.run())
    assert sizes == {1: 16, 12: 1}
    for session in list(world.book.sessions.values())[:16]:
        world.close(session)
    assert [part.num_tokens for part in world.run()] == [256]


def test_the_first_of_several_stages_keeps_them_all_busy() -> None:
    world = World(400, StepLimits(), (*SPLIT[:1], Stage(OTHER, "x:1", 1, 2)), delay=2)
    for _ in range(9):
        world.open(Request(0, 1, 1, 300))
    sizes = [len(world.run()) for _ in range(12)]
    # The prompts run at once; then two stages have half of the sessions each.
    assert sizes[0] == 9
    assert max(sizes[2:]) == 5
    assert sum(sizes[2:]) == 10 / 2 * 9


def test_who_was_preempted_comes_before_who_is_new() -> None:
    world = World(8, StepLimits())
    old, young = Request(0, 1, 44, 60), Request(0, 2, 40, 60)
    world.open(old)
    world.open(young)
    while young.session is not None:
        world.run()
    with pytest.raises(Refusal, match="KV room needed"):
        world.open(young)
    assert old.session is not None
    with pytest.raises(Refusal, match="for who waits longer"):
        world.open(Request(0, 3, 1, 2))
    world.close(old.session)
    world.open(young)
    world.open(Request(0, 3, 1, 2))


def test_pace_follows_what_steps_take() -> None:
    pace = Pace(0.002, 0.001)
    assert pace.decode_s(4) == 0.002
    for _ in range(40):
        pace.learn(16, 0, 0.012)
        pace.learn(16, 20, 0.022)
    assert pace.decode_s(16) == pytest.approx(0.012, rel=0.01)
    assert pace.decode_s(31) == pytest.approx(0.012, rel=0.01)
    assert pace.decode_s(3) == 0.002
    assert pace.prefill_s_per_token == pytest.approx(0.0005, rel=0.05)
    # One step that took a second, for whatever reason, is not the new measure.
    pace.learn(16, 0, 1.0)
    assert pace.decode_s(16) < 0.018


def test_a_long_prompt_does_not_stall_sixteen_streams() -> None:
    """In made-up seconds: 16 decodes take 12 ms, a prefill token 0.6, a bit less beside them."""
    world = World(2600, StepLimits())
    for _ in range(16):
        world.open(Request(0, 1, 4, 2000))
    now_s, last_s, gaps = 0.0, dict[StageSession, float](), list[float]()
    (group,) = world.book.groups.values()
    pace, arrived_s = group.pace, 0.0
    long = Request(0, 2, 4095, 1)
    while not long.num_output:
        if world.step == 30:
            world.open(long)
            arrived_s = now_s
        batch = world.run()
        num_decodes = sum(part.position >= part.session.num_prompt_tokens for part in batch)
        num_prefill = sum(part.num_tokens for part in batch) - num_decodes
        step_s = 0.007 + 0.0003 * num_decodes + num_prefill * (0.0005 if num_decodes else 0.0006)
        pace.learn(num_decodes, num_prefill, step_s)
        now_s += step_s
        for part in batch:
            if part.position >= part.session.num_prompt_tokens:
                if part.session in last_s:
                    gaps.append(now_s - last_s[part.session])
                last_s[part.session] = now_s
    undisturbed = 0.007 + 0.0003 * 16
    # The first chunk is sized by what was measured at start; then the steps themselves tell.
    assert sorted(gaps)[int(len(gaps) * 0.99)] < 2.2 * undisturbed
    # It still arrives in less than thrice the time it would take alone.
    assert now_s - arrived_s < 3 * 4096 * 0.0006


def test_who_gives_way_when_blocks_run_out() -> None:
    """Who waits for its head, then the youngest, replays last; in the end oneself."""
    world = World(20, StepLimits())
    replay, paused, old, young, needy = (Request(0, number, 20, 100) for number in range(5))
    replay.num_output = 2
    for request in (paused, old, needy, young, replay):
        world.open(request)
    names = {replay: "replay", paused: "paused", old: "old", young: "young", needy: "needy"}
    assert paused.session is not None
    assert needy.session is not None
    world.book.pause(paused.session)
    lost = []
    for num_tokens in range(64, 20 * BLOCK_TOKENS + 1, BLOCK_TOKENS):
        part = Slice(needy.session, num_tokens - 1, 1, (1,), 0, 0.0)
        preempted = make_room([part], list(world.book.sessions.values()))
        lost += [names[world.requests[session.id]] for session in preempted]
    assert lost == ["paused", "young", "needy"]
