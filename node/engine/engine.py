"""The batch loop of one device. `step()` = schedule, run, sample, send; all else is an entry in the inbox.

Life of a session here: the head opens it (KV room reserved, next hop dialled) and is told so; the first stage
starts when told; inputs arrive as hidden states or tokens; each step runs what has arrived, of all sessions
together; the head closes it. One thread owns all state; links and loaders only post calls to its inbox.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ledger.rate_card import DEFAULT_RATE_CARD, RateCard
from ledger.receipt import Dispute, Sign
from node.engine.attention import PagedStep, Span
from node.engine.events import EngineEvent, ReceiptHeld, SessionEnded
from node.engine.loaded import LoadedShard
from node.engine.meter import Meter
from node.engine.opening import Refusal, find_shard
from node.engine.outbox import Outbox, rows_tensor
from node.engine.sampling import Draw, finish_reason, sample
from node.engine.scheduler import Slice, StepLimits, schedule
from node.engine.session import BadFrame, StageSession, max_num_tokens
from node.links.frames import (
    CloseSession,
    ErrorCode,
    FinishReason,
    Frame,
    HiddenBatch,
    HiddenItem,
    Lane,
    OpenSession,
    ReceiptSigned,
    SessionError,
    SessionOpened,
    SignReceipt,
    StageTiming,
    StartSession,
    TokenBatch,
    TokenItem,
)
from node.links.port import DownCallback, FrameCallback, LinkDown, LinkFull, StageLinks

log = logging.getLogger(__name__)

MakeLinks = Callable[[FrameCallback, DownCallback, DownCallback], StageLinks]
Answer = TypeVar("Answer")

CONNECT_TIMEOUT_S = 5.0
BULK_RETRY_S = 0.002
STOP_TIMEOUT_S = 10.0
MAX_WAIT_S = 3600.0
MAX_NUM_UNSIGNED_OUTPUT_TOKENS = 256


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
    ) -> None:
        self._node = node
        self._pod = pod
        self._sign = sign
        self._on_event = on_event
        self._clock_ms = clock_ms
        self._limits = limits or StepLimits()
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._shards: list[LoadedShard] = []
        self._rate_cards: dict[int, RateCard] = {DEFAULT_RATE_CARD.version: DEFAULT_RATE_CARD}
        self._sessions: dict[bytes, StageSession] = {}
        self._ready: dict[bytes, StageSession] = {}
        self._next_deadline_ms: int | None = None
        self._is_stopping = False
        self._dialler = ThreadPoolExecutor(max_workers=4, thread_name_prefix="engine-dial")
        self._thread = threading.Thread(target=self._loop, name="engine-loop", daemon=True)
        self.links = make_links(
            lambda peer, frame: self._post(self._frame_arrived, peer, frame),
            lambda peer, reason: self._post(self._link_went_down, peer, reason),
            lambda head, reason: self._post(self._head_went_down, head, reason),
        )
        self._outbox = Outbox(self.links)

    # What other threads ask for.

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends every session with SHUTTING_DOWN and closes the links."""
        self._post(self._shut_down)
        self._thread.join(STOP_TIMEOUT_S)
        self._dialler.shutdown(wait=False, cancel_futures=True)
        self.links.close()

    def add_shard(self, loaded: LoadedShard) -> None:
        self._post(self._shards.append, loaded)

    def drop_shard(self, model: bytes, start_layer: int, end_layer: int) -> Future[LoadedShard | None]:
        """Sessions on it end. None: there was no such shard."""
        return self._ask(partial(self._drop_shard, model, start_layer, end_layer))

    def set_rate_card(self, card: RateCard) -> None:
        self._post(self._rate_cards.__setitem__, card.version, card)

    def shards(self) -> Future[list[tuple[LoadedShard, int]]]:
        """Each shard with its number of open sessions."""
        return self._ask(self._shards_and_sessions)

    # The loop.

    def _loop(self) -> None:
        with torch.inference_mode():
            while not self._is_stopping:
                self._drain_inbox(wait=not self._ready)
                if self._ready and not self.step():
                    # All that waits, waits for a next hop to read on; nothing tells when it does.
                    self._drain_inbox(wait=True, timeout_s=BULK_RETRY_S)
                self._end_overdue()

    def step(self) -> bool:
        """Schedule, run, sample, send. False when nothing could be scheduled."""
        batch = schedule(self._ready.values(), self._limits, self.links.can_send_bulk)
        self._reorder_ready(batch)
        groups: dict[tuple[int, int, int], list[Slice]] = {}
        for part in batch:
            stage = part.session.stage
            key = (id(part.session.loaded), stage.start_layer, stage.end_layer)
            groups.setdefault(key, []).append(part)
        for group in groups.values():
            self._run_or_end(group)
        for lost in self._outbox.send():
            self._end_all(lost.sessions, ErrorCode.NEXT_HOP_UNREACHABLE, lost.reason)
        return bool(batch)

    def _reorder_ready(self, batch: Sequence[Slice]) -> None:
        """Who has just run goes to the back, or out when nothing of it waits."""
        for part in batch:
            session = self._ready.pop(part.session.id)
            if session.waiting:
                self._ready[session.id] = session

    def _run_or_end(self, group: Sequence[Slice]) -> None:
        """A failing step takes the sessions in it along, and nothing else."""
        started_s = time.perf_counter()
        try:
            self._run(group)
        except Exception as error:
            log.exception("a step failed")
            reason = f"a step failed: {type(error).__name__}"
            self._end_all([part.session.id for part in group], ErrorCode.INTERNAL, reason)
            return
        compute_s = time.perf_counter() - started_s
        for part in group:
            self._account(part, started_s, compute_s)

    def _run(self, group: Sequence[Slice]) -> None:
        loaded, stage = group[0].session.loaded, group[0].session.stage
        shard = loaded.shard
        data = torch.cat([part.input.data.to(shard.device) for part in group])
        hidden_TD = shard.embed(data) if stage.start_layer == 0 else data.to(shard.dtype)
        spans = [Span(part.session.table, part.input.position, part.num_tokens) for part in group]
        positions = [position for part in group for position in range(part.input.position, part.end)]
        hidden_TD = shard.run(
            hidden_TD,
            torch.tensor(positions, device=shard.device),
            PagedStep(loaded.cache, spans),
            stage.start_layer,
            stage.end_layer,
        )
        if stage.end_layer == loaded.manifest.num_layers:
            self._sample(group, hidden_TD)
        else:
            self._pass_on(group, hidden_TD)

    def _pass_on(self, group: Sequence[Slice], hidden_TD: Tensor) -> None:
        row = 0
        for part in group:
            session, position = part.session, part.input.position
            lane = Lane.BULK if position < session.num_prompt_tokens else Lane.DECODE
            item = HiddenItem(session.id, position, part.num_tokens)
            self._outbox.add_hidden(session.next_node, lane, item, hidden_TD[row : row + part.num_tokens])
            row += part.num_tokens

    def _sample(self, group: Sequence[Slice], hidden_TD: Tensor) -> None:
        """A token for each session whose prompt is complete; the others only filled their KV."""
        last_rows, sampled, row = [], [], -1
        for part in group:
            row += part.num_tokens
            if part.end >= part.session.num_prompt_tokens:
                sampled.append(part)
                last_rows.append(row)
        if not sampled:
            return
        draws = [_draw(part) for part in sampled]
        logits_BV = sampled[0].session.loaded.shard.logits(hidden_TD[last_rows])
        for part, draw, token_id in zip(sampled, draws, sample(logits_BV, draws), strict=True):
            self._token_picked(part.session, draw, token_id)

    def _token_picked(self, session: StageSession, draw: Draw, token_id: int) -> None:
        reason = finish_reason(token_id, draw)
        item = TokenItem(session.id, draw.position, token_id, reason)
        goes_on = reason is FinishReason.NONE
        is_alone = session.is_first_stage
        self._outbox.add_token(
            session.opening.head, session.next_node if goes_on and not is_alone else None, item
        )
        if goes_on and is_alone:
            self._push(session, draw.position, torch.tensor([token_id]))
        session.is_finished = not goes_on

    def _account(self, part: Slice, started_s: float, compute_s: float) -> None:
        session = part.session
        session.meter.count(part.input.position, part.num_tokens)
        session.num_steps += 1
        session.compute_s += compute_s
        session.queue_s += max(0.0, started_s - part.input.arrived_s)
        num_unsigned = session.meter.num_unsigned_output_tokens
        if num_unsigned > MAX_NUM_UNSIGNED_OUTPUT_TOKENS:
            self._end(session, ErrorCode.UNSIGNED_LIMIT, f"{num_unsigned} output tokens are not signed for")

    # What arrives.

    def _frame_arrived(self, peer: bytes, frame: Frame) -> None:
        match frame:
            case HiddenBatch():
                self._hidden_arrived(peer, frame)
            case TokenBatch():
                self._tokens_arrived(peer, frame)
            case OpenSession():
                self._open(peer, frame)
            case StartSession() | CloseSession() | SignReceipt():
                session = self._sessions.get(frame.session)
                if session is not None and session.opening.head == peer:
                    self._head_said(session, frame)
            case _:
                log.warning("a %s is nothing a stage takes", type(frame).__name__)

    def _hidden_arrived(self, peer: bytes, frame: HiddenBatch) -> None:
        rows_TD, row = rows_tensor(frame), 0
        for item in frame.items:
            data, row = rows_TD[row : row + item.num_tokens], row + item.num_tokens
            session = self._sessions.get(item.session)
            if session is None or session.is_first_stage or session.previous_node != peer:
                continue
            if frame.hidden_size != session.loaded.manifest.hidden_size:
                self._end(
                    session, ErrorCode.BAD_FRAME, f"rows of {frame.hidden_size} values are not this model's"
                )
                continue
            self._push(session, item.position, data)

    def _tokens_arrived(self, peer: bytes, frame: TokenBatch) -> None:
        for item in frame.items:
            session = self._sessions.get(item.session)
            if session is None or not session.is_first_stage or session.previous_node != peer:
                continue
            if not 0 <= item.token_id < session.loaded.manifest.vocab_size or not session.is_started:
                self._end(session, ErrorCode.BAD_FRAME, "that token cannot be")
                continue
            self._push(session, item.position, torch.tensor([item.token_id]))

    def _push(self, session: StageSession, position: int, data: Tensor) -> None:
        try:
            session.push(position, data, time.perf_counter())
        except BadFrame as error:
            self._end(session, ErrorCode.BAD_FRAME, str(error))
        else:
            self._ready[session.id] = session

    def _open(self, peer: bytes, opening: OpenSession) -> None:
        if opening.session in self._sessions:
            return
        try:
            session = self._admit(peer, opening)
        except Refusal as refusal:
            self._tell_head(
                peer, SessionError(opening.session, opening.stage_index, refusal.code, str(refusal))
            )
            return
        self._sessions[session.id] = session
        self._find_next_deadline()
        if len(opening.route) == 1:
            self._next_hop_connected(session, None)
        else:
            self._dialler.submit(self._dial, session)

    def _admit(self, peer: bytes, opening: OpenSession) -> StageSession:
        """Check, then reserve KV room for the whole session. Raises Refusal."""
        loaded = find_shard(opening, self._node, peer, self._shards)
        rate_card = self._rate_cards.get(opening.rate_card_version)
        if rate_card is None:
            raise Refusal(ErrorCode.BAD_FRAME, f"rate card {opening.rate_card_version} is not known here")
        if opening.deadline_ms <= self._clock_ms():
            raise Refusal(ErrorCode.DEADLINE, "the session's deadline has passed")
        num_tokens = max_num_tokens(opening)
        if not loaded.cache.can_open(num_tokens):
            room = f"{loaded.cache.num_free_tokens} of {loaded.cache.num_tokens}"
            raise Refusal(ErrorCode.NO_KV_ROOM, f"{num_tokens} tokens of KV room needed, {room} are free")
        stage = opening.route[opening.stage_index]
        num_parameters = loaded.manifest.stage_num_parameters(stage.start_layer, stage.end_layer)
        meter = Meter(opening, self._pod, num_parameters, rate_card)
        return StageSession(opening, loaded, loaded.cache.open(num_tokens), meter)

    def _dial(self, session: StageSession) -> None:
        """On a dialling thread: the token path never waits for a handshake."""
        route = session.opening.route
        stage = route[(session.opening.stage_index + 1) % len(route)]
        try:
            self.links.connect(stage.node, stage.data_address, CONNECT_TIMEOUT_S)
            problem = None
        except LinkDown as error:
            problem = str(error)
        self._post(self._next_hop_connected, session, problem)

    def _next_hop_connected(self, session: StageSession, problem: str | None) -> None:
        if self._sessions.get(session.id) is not session:
            return
        if problem is not None:
            self._end(session, ErrorCode.NEXT_HOP_UNREACHABLE, f"the next stage is unreachable: {problem}")
        else:
            self._tell_head(session.opening.head, SessionOpened(session.id, session.opening.stage_index))

    def _head_said(self, session: StageSession, frame: StartSession | CloseSession | SignReceipt) -> None:
        match frame:
            case StartSession():
                if session.is_first_stage and not session.is_started:
                    session.is_started = True
                    self._push(session, 0, torch.tensor(session.opening.prompt_ids))
            case SignReceipt():
                self._sign_receipt(session, frame.receipt)
            case CloseSession():
                self._tell_head(session.opening.head, _timing(session))
                self._forget(session, "")

    def _sign_receipt(self, session: StageSession, raw: bytes) -> None:
        try:
            receipt = session.meter.co_sign(raw, self._sign)
        except Dispute as dispute:
            self._end(session, ErrorCode.DISPUTED_RECEIPT, str(dispute))
            return
        self._on_event(ReceiptHeld(session.id, receipt))
        self._tell_head(session.opening.head, ReceiptSigned(session.id, receipt))

    def _link_went_down(self, peer: bytes, reason: str) -> None:
        message = f"a neighbour in the route is gone: {reason}"
        for session in list(self._sessions.values()):
            if len(session.opening.route) > 1 and peer in (session.next_node, session.previous_node):
                self._end(session, ErrorCode.NEXT_HOP_UNREACHABLE, message)

    def _head_went_down(self, head: bytes, reason: str) -> None:
        for session in list(self._sessions.values()):
            if session.opening.head == head:
                self._forget(session, f"the head is gone: {reason}")

    # How sessions end.

    def _end(self, session: StageSession, code: ErrorCode, message: str) -> None:
        error = SessionError(session.id, session.opening.stage_index, code, message)
        self._tell_head(session.opening.head, error)
        self._forget(session, message)

    def _end_all(self, sessions: Sequence[bytes], code: ErrorCode, message: str) -> None:
        for session_id in sessions:
            session = self._sessions.get(session_id)
            if session is not None:
                self._end(session, code, message)

    def _end_overdue(self) -> None:
        now_ms = self._clock_ms()
        if self._next_deadline_ms is None or now_ms < self._next_deadline_ms:
            return
        for session in list(self._sessions.values()):
            if session.opening.deadline_ms <= now_ms:
                self._end(session, ErrorCode.DEADLINE, "the session's deadline has passed")

    def _forget(self, session: StageSession, reason: str) -> None:
        """KV is free at once; frames still on their way find no session and are dropped."""
        if self._sessions.pop(session.id, None) is None:
            return
        self._ready.pop(session.id, None)
        session.waiting.clear()
        session.loaded.cache.close(session.table)
        self._find_next_deadline()
        meter = session.meter
        self._on_event(
            SessionEnded(
                session.id, session.opening.model, meter.num_prompt_tokens, meter.num_output_tokens, reason
            )
        )

    def _find_next_deadline(self) -> None:
        deadlines = (session.opening.deadline_ms for session in self._sessions.values())
        self._next_deadline_ms = min(deadlines, default=None)

    def _drop_shard(self, model: bytes, start_layer: int, end_layer: int) -> LoadedShard | None:
        for loaded in self._shards:
            if (loaded.model, loaded.start_layer, loaded.end_layer) == (model, start_layer, end_layer):
                using = [session.id for session in self._sessions.values() if session.loaded is loaded]
                self._end_all(using, ErrorCode.SHUTTING_DOWN, "the shard was dropped")
                self._shards.remove(loaded)
                return loaded
        return None

    def _shards_and_sessions(self) -> list[tuple[LoadedShard, int]]:
        sessions = self._sessions.values()
        return [(loaded, sum(session.loaded is loaded for session in sessions)) for loaded in self._shards]

    def _shut_down(self) -> None:
        self._end_all(list(self._sessions), ErrorCode.SHUTTING_DOWN, "the engine is stopping")
        self._is_stopping = True

    # The inbox.

    def _post(self, call: Callable[..., object], *arguments: object) -> None:
        self._inbox.put(partial(call, *arguments))

    def _ask(self, call: Callable[[], Answer]) -> Future[Answer]:
        future: Future[Answer] = Future()
        self._post(lambda: future.set_result(call()))
        return future

    def _drain_inbox(self, wait: bool, timeout_s: float | None = None) -> None:
        """Run all that was posted; with `wait`, sleep until something is, a deadline comes or time is up."""
        if wait:
            if timeout_s is None and self._next_deadline_ms is not None:
                left_s = (self._next_deadline_ms - self._clock_ms()) / 1000
                timeout_s = min(max(0.0, left_s), MAX_WAIT_S)
            try:
                self._run_posted(self._inbox.get(timeout=timeout_s))
            except queue.Empty:
                return
        while True:
            try:
                self._run_posted(self._inbox.get_nowait())
            except queue.Empty:
                return

    def _run_posted(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception:
            log.exception("an entry of the inbox failed")

    def _tell_head(self, head: bytes, frame: Frame) -> None:
        """A head that cannot be told has lost its link, and with it its sessions."""
        try:
            self.links.send_to_head(head, frame)
        except (LinkDown, LinkFull) as error:
            log.info("the head could not be told: %s", error)


def _draw(part: Slice) -> Draw:
    opening = part.session.opening
    num_own_prompt_tokens = opening.num_prompt_tokens - opening.num_output_tokens_before
    return Draw(opening.sampling, part.end, part.end - num_own_prompt_tokens)


def _timing(session: StageSession) -> StageTiming:
    return StageTiming(
        session.id,
        session.opening.stage_index,
        session.num_steps,
        int(session.compute_s * 1e6),
        int(session.queue_s * 1e6),
    )
