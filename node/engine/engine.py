"""The batch loop of one device. `step()` = schedule, run, sample, send; all else is an entry in the inbox.

Life of a session here: the head opens it (`admission.py`), the next hop is dialled, the head is told; the
first stage starts when told; inputs arrive as hidden states or tokens (`arrivals.py`); each step runs what
has arrived, of all sessions together; the head closes it (`endings.py`). One thread owns all state; links and
loaders only post calls to its inbox.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import torch

from ledger.rate_card import DEFAULT_RATE_CARD, RateCard
from ledger.receipt import Sign
from node.engine.admission import MAX_NUM_SESSIONS, Admission
from node.engine.arrivals import Arrivals
from node.engine.dialler import Dialler
from node.engine.endings import Endings
from node.engine.events import EngineEvent
from node.engine.fair_share import FairShare
from node.engine.group import Group
from node.engine.inbox import Inbox
from node.engine.layer_pass import run_layers
from node.engine.loaded import LoadedShard
from node.engine.messages import MAX_NUM_RATE_CARDS, MemberStanding
from node.engine.outbox import Outbox
from node.engine.outputs import Outputs, account
from node.engine.room import make_room
from node.engine.scheduler import StepLimits, schedule
from node.engine.session import Slice
from node.engine.session_book import SessionBook
from node.engine.waiting_room import CHECK_EVERY_MS
from node.links.frames import ErrorCode
from node.links.port import DownCallback, FrameCallback, StageLinks

log = logging.getLogger(__name__)

MakeLinks = Callable[[FrameCallback, DownCallback, DownCallback], StageLinks]
Answer = TypeVar("Answer")

BULK_RETRY_S = 0.002
STOP_TIMEOUT_S = 10.0
MAX_WAIT_S = 3600.0
MAX_NUM_ENTRIES_PER_STEP = 256
MAX_ENTRIES_S = 0.02


class Engine:
    """`start()` and `stop()` own the loop thread; the other public methods may be called from any thread."""

    def __init__(
        self,
        node: bytes,
        pod: bytes,
        sign: Sign,
        make_links: MakeLinks,
        on_event: Callable[[EngineEvent], None],
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        limits: StepLimits | None = None,
        on_crash: Callable[[], None] = lambda: None,
        hidden_bits: int = 16,
        max_num_sessions: int = MAX_NUM_SESSIONS,
    ) -> None:
        """`on_crash` is called when the loop cannot go on: nothing is served any more. `hidden_bits`: how
        hidden states travel to the next stage, 16 (as they are), 8, or 0 for 8 where the way is long.
        """
        self._clock_ms = clock_ms
        self._limits = limits or StepLimits()
        self._on_crash = on_crash
        self._inbox = Inbox()
        self._shards: list[LoadedShard] = []
        self._rate_cards: dict[int, RateCard] = {DEFAULT_RATE_CARD.version: DEFAULT_RATE_CARD}
        self._book = SessionBook()
        self._fair_share = FairShare(node, pod, clock_ms)
        self._is_stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine-loop", daemon=True)
        self.links = make_links(
            lambda peer, frame: self._inbox.put_frame(partial(self._arrivals.frame, peer, frame), peer),
            lambda peer, reason: self._inbox.put(partial(self._arrivals.link_down, peer, reason), peer),
            lambda head, reason: self._inbox.put(partial(self._arrivals.head_down, head, reason), head),
        )
        self._endings = Endings(self._book, self.links, on_event, clock_ms)
        self._dialler = Dialler(
            self.links,
            self._book.sessions.__contains__,
            lambda dial, problem: self._post(self._arrivals.dialled, dial, problem),
        )
        self._arrivals = Arrivals(
            self._book,
            Admission(
                node,
                pod,
                self._book,
                self._shards,
                self._rate_cards,
                clock_ms,
                self._fair_share,
                max_num_sessions,
            ),
            self._endings,
            self._dialler,
            self.links,
            sign,
            on_event,
            clock_ms,
        )
        self._outbox = Outbox(self.links, hidden_bits)
        self._outputs = Outputs(self._outbox, self._arrivals.picked)

    # What other threads ask for.

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends every session with SHUTTING_DOWN and closes the links."""
        self._post(self._shut_down)
        self._thread.join(STOP_TIMEOUT_S)
        self._inbox.close()
        self._dialler.close()
        self.links.close()

    def add_shard(self, loaded: LoadedShard) -> None:
        self._post(self._shards.append, loaded)

    def drop_shard(self, model: bytes, start_layer: int, end_layer: int) -> Future[LoadedShard | None]:
        """Sessions on it end. None: there was no such shard."""
        return self._ask(partial(self._drop_shard, model, start_layer, end_layer))

    def set_rate_card(self, card: RateCard) -> None:
        self._post(self._keep_rate_card, card)

    def _keep_rate_card(self, card: RateCard) -> None:
        self._rate_cards.pop(card.version, None)
        self._rate_cards[card.version] = card
        while len(self._rate_cards) > MAX_NUM_RATE_CARDS:
            del self._rate_cards[next(iter(self._rate_cards))]

    def set_standings(self, standings: Sequence[MemberStanding]) -> None:
        """Who the members are, what they weigh, which nodes are theirs."""
        self._post(self._fair_share.set_standings, standings)

    def shards(self) -> Future[list[tuple[LoadedShard, int]]]:
        """Each shard with its number of open sessions."""
        return self._ask(self._shards_and_sessions)

    # The loop.

    def _loop(self) -> None:
        try:
            with torch.inference_mode():
                while not self._is_stopping:
                    self._drain_inbox(wait=not self._book.ready)
                    self._arrivals.admit_waiting()
                    if self._book.ready and not self.step():
                        # All that waits, waits for a next hop to read on; nothing tells when it does.
                        self._drain_inbox(wait=True, timeout_s=BULK_RETRY_S)
                    self._endings.end_overdue()
        except Exception:
            log.exception("the batch loop failed")
            self._on_crash()

    def step(self) -> bool:
        """Schedule, run, sample, send. False when nothing could be scheduled."""
        book = self._book
        batch = schedule(
            book.ready,
            book.groups.values(),
            self._limits,
            self.links.can_send_bulk,
            self._fair_share.rank if len(book.num_of_payer) > 1 else None,
        )
        for part in batch:
            del book.ready[part.session]
        preempted = make_room(batch, book.sessions.values())
        for session in preempted:
            self._fair_share.preempted(session)
            self._endings.unpaid.interrupted(session.head, session.next_position)
            self._endings.set_aside(session, ErrorCode.PREEMPTED, "its KV room went to older sessions")
        runnable = [part for part in batch if not part.session.is_set_aside] if preempted else batch
        for group, parts in _by_group(runnable).items():
            self._run(group, parts)
        for lost in self._outbox.send():
            self._endings.set_aside_all(lost.sessions, ErrorCode.NEXT_HOP_UNREACHABLE, lost.reason)
        return bool(batch)

    def _run(self, group: Group, parts: Sequence[Slice]) -> None:
        """A failing pass takes the sessions in it along, and nothing else."""
        started_s = time.perf_counter()
        try:
            broken = self._outputs.take(group, parts, run_layers(group, parts))
        except Exception as error:
            log.exception("a step failed")
            reason = f"a step failed: {type(error).__name__}"
            self._endings.end_all([part.session.id for part in parts], ErrorCode.INTERNAL, reason)
            return
        account(parts, started_s)
        self._fair_share.charge(parts)
        for part in parts:
            session = part.session
            if session.meter.is_at_limit:
                self._endings.wait_for_signature(session)
            elif session.waiting:
                self._book.make_ready(session)
        for session in broken:
            self._endings.end(session, ErrorCode.INTERNAL, "the model produced NaN")

    def _drop_shard(self, model: bytes, start_layer: int, end_layer: int) -> LoadedShard | None:
        for loaded in self._shards:
            if (loaded.model, loaded.start_layer, loaded.end_layer) == (model, start_layer, end_layer):
                sessions = self._book.sessions.values()
                using = [session.id for session in sessions if session.loaded is loaded]
                self._endings.end_all(using, ErrorCode.SHUTTING_DOWN, "the shard was dropped")
                self._book.drop_groups(loaded)
                self._shards.remove(loaded)
                return loaded
        return None

    def _shards_and_sessions(self) -> list[tuple[LoadedShard, int]]:
        sessions = self._book.sessions.values()
        return [(loaded, sum(session.loaded is loaded for session in sessions)) for loaded in self._shards]

    def _shut_down(self) -> None:
        self._endings.end_all(list(self._book.sessions), ErrorCode.SHUTTING_DOWN, "the engine is stopping")
        self._is_stopping = True

    # The inbox.

    def _post(self, call: Callable[..., object], *arguments: object) -> None:
        self._inbox.put(partial(call, *arguments))

    def _ask(self, call: Callable[[], Answer]) -> Future[Answer]:
        future: Future[Answer] = Future()
        self._post(lambda: future.set_result(call()))
        return future

    def _drain_inbox(self, wait: bool, timeout_s: float | None = None) -> None:
        """Some of what was posted, so that steps go on under any flood; with `wait`, sleep until something
        is, a deadline comes or time is up.
        """
        if not wait:
            timeout_s = 0
        elif timeout_s is None and (deadline_ms := self._book.next_deadline_ms) is not None:
            left_s = (deadline_ms - self._clock_ms()) / 1000
            timeout_s = min(max(0.0, left_s), MAX_WAIT_S)
        if timeout_s != 0 and self._arrivals.has_waiting:
            timeout_s = min(timeout_s or MAX_WAIT_S, CHECK_EVERY_MS / 1000)
        until_s = None
        for _ in range(MAX_NUM_ENTRIES_PER_STEP):
            call = self._inbox.take(timeout_s)
            if call is None:
                return
            self._run_posted(call)
            now_s = time.perf_counter()
            until_s = until_s or now_s + MAX_ENTRIES_S
            if now_s > until_s:
                return
            timeout_s = 0

    def _run_posted(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception:
            log.exception("an entry of the inbox failed")


def _by_group(batch: Sequence[Slice]) -> dict[Group, list[Slice]]:
    groups: dict[Group, list[Slice]] = {}
    for part in batch:
        group = part.session.group
        if group in groups:
            groups[group].append(part)
        else:
            groups[group] = [part]
    return groups
