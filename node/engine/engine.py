"""The batch loop of one device. `step()` = schedule, run, sample, send; all else is an entry in the inbox.

Life of a session here: the head opens it (KV room reserved, next hop dialled) and is told so; the first stage
starts when told; inputs arrive as hidden states or tokens; each step runs what has arrived, of all sessions
together; the head closes it. One thread owns all state; links and loaders only post calls to its inbox.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ledger.rate_card import DEFAULT_RATE_CARD, RateCard
from ledger.receipt import Dispute, Sign
from node.engine.attention import PagedStep, Span
from node.engine.dialler import Dial, Dialler
from node.engine.events import EngineEvent, ReceiptHeld, SessionEnded
from node.engine.inbox import Inbox
from node.engine.loaded import LoadedShard
from node.engine.meter import Meter
from node.engine.opening import Refusal, find_shard, packed_ids
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

BULK_RETRY_S = 0.002
STOP_TIMEOUT_S = 10.0
MAX_WAIT_S = 3600.0
MAX_NUM_UNSIGNED_OUTPUT_TOKENS = 256
MAX_NUM_ENTRIES_PER_STEP = 256
MAX_ENTRIES_S = 0.02
MAX_NUM_SESSIONS = 4096
MAX_NUM_SESSIONS_PER_HEAD = 1024
MAX_SESSION_MS = 3600_000
MAX_UNSTARTED_MS = 30_000
# The rows of a later stage may stand behind other prompts at the stages before it.
MAX_UNFED_MS = 600_000


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
    ) -> None:
        """`on_crash` is called when the loop cannot go on: nothing is served any more."""
        self._node = node
        self._pod = pod
        self._sign = sign
        self._on_event = on_event
        self._clock_ms = clock_ms
        self._limits = limits or StepLimits()
        self._on_crash = on_crash
        self._inbox = Inbox()
        self._shards: list[LoadedShard] = []
        self._rate_cards: dict[int, RateCard] = {DEFAULT_RATE_CARD.version: DEFAULT_RATE_CARD}
        self._sessions: dict[bytes, StageSession] = {}
        self._ready: dict[bytes, StageSession] = {}
        self._num_sessions: Counter[bytes] = Counter()
        self._deadlines: list[tuple[int, bytes]] = []
        self._is_stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine-loop", daemon=True)
        self.links = make_links(
            lambda peer, frame: self._inbox.put_frame(partial(self._frame_arrived, peer, frame), peer),
            lambda peer, reason: self._inbox.put(partial(self._link_went_down, peer, reason), peer),
            lambda head, reason: self._inbox.put(partial(self._head_went_down, head, reason), head),
        )
        self._outbox = Outbox(self.links)
        self._dialler = Dialler(
            self.links,
            self._sessions.__contains__,
            lambda dial, problem: self._post(self._dialled, dial, problem),
        )

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
        self._post(self._rate_cards.__setitem__, card.version, card)

    def shards(self) -> Future[list[tuple[LoadedShard, int]]]:
        """Each shard with its number of open sessions."""
        return self._ask(self._shards_and_sessions)

    # The loop.

    def _loop(self) -> None:
        try:
            with torch.inference_mode():
                while not self._is_stopping:
                    self._drain_inbox(wait=not self._ready)
                    if self._ready and not self.step():
                        # All that waits, waits for a next hop to read on; nothing tells when it does.
                        self._drain_inbox(wait=True, timeout_s=BULK_RETRY_S)
                    self._end_overdue()
        except Exception:
            log.exception("the batch loop failed")
            self._on_crash()

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
            if position == 0:
                self._set_deadline(session, session.end_ms)

    def _open(self, peer: bytes, opening: OpenSession) -> None:
        if opening.session in self._sessions:
            return
        try:
            session = self._admit(peer, opening)
        except Refusal as refusal:
            error = SessionError(opening.session, opening.stage_index, refusal.code, str(refusal))
            self._send_to_head(peer, error)
            return
        self._sessions[session.id] = session
        self._num_sessions[peer] += 1
        wait_ms = MAX_UNSTARTED_MS if session.is_first_stage else MAX_UNFED_MS
        self._set_deadline(session, min(session.end_ms, self._clock_ms() + wait_ms))
        self._connect_next_hop(session)

    def _admit(self, peer: bytes, opening: OpenSession) -> StageSession:
        """Check, then reserve KV room for the whole session. Raises Refusal."""
        if (num_open := self._num_sessions[peer]) >= MAX_NUM_SESSIONS_PER_HEAD:
            raise Refusal(ErrorCode.NO_KV_ROOM, f"{num_open} sessions of this head are open here already")
        if (num_open := len(self._sessions)) >= MAX_NUM_SESSIONS:
            raise Refusal(ErrorCode.NO_KV_ROOM, f"{num_open} sessions are open here already")
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
        kept = replace(opening, prompt_ids=())
        return StageSession(
            opening=kept,
            loaded=loaded,
            table=loaded.cache.open(num_tokens),
            meter=Meter(kept, self._pod, num_parameters, rate_card),
            end_ms=min(opening.deadline_ms, self._clock_ms() + MAX_SESSION_MS),
            prompt_ids=packed_ids(opening.prompt_ids),
        )

    def _connect_next_hop(self, session: StageSession) -> None:
        """The head is told that the session is open when the hop is there, at once if it is already."""
        opening = session.opening
        if len(opening.route) == 1 or self.links.is_connected(session.next_node):
            self._tell(session, SessionOpened(session.id, opening.stage_index))
            return
        try:
            self._dialler.request(opening.head, session.id, session.next_stage)
        except LinkDown as error:
            self._hop_is_unreachable(session, str(error))

    def _dialled(self, dial: Dial, problem: str | None) -> None:
        for session_id in self._dialler.finish(dial):
            session = self._sessions.get(session_id)
            if session is None:
                continue
            if problem is not None:
                self._hop_is_unreachable(session, problem)
            else:
                self._connect_next_hop(session)

    def _hop_is_unreachable(self, session: StageSession, problem: str) -> None:
        self._end(session, ErrorCode.NEXT_HOP_UNREACHABLE, f"the next stage is unreachable: {problem}")

    def _head_said(self, session: StageSession, frame: StartSession | CloseSession | SignReceipt) -> None:
        match frame:
            case StartSession():
                if session.is_first_stage and not session.is_started:
                    session.is_started = True
                    prompt_ids, session.prompt_ids = session.prompt_ids, packed_ids(())
                    self._push(session, 0, torch.tensor(prompt_ids.tolist()))
            case SignReceipt():
                self._sign_receipt(session, frame.receipt)
            case CloseSession():
                self._send_to_head(session.opening.head, _timing(session))
                self._forget(session, "")

    def _sign_receipt(self, session: StageSession, raw: bytes) -> None:
        try:
            receipt = session.meter.co_sign(raw, self._sign)
            if receipt is None:
                return
        except Dispute as dispute:
            self._end(session, ErrorCode.DISPUTED_RECEIPT, str(dispute))
            return
        self._on_event(ReceiptHeld(session.id, receipt))
        self._tell(session, ReceiptSigned(session.id, receipt))

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
        self._send_to_head(session.opening.head, error)
        self._forget(session, message)

    def _end_all(self, sessions: Sequence[bytes], code: ErrorCode, message: str) -> None:
        for session_id in sessions:
            session = self._sessions.get(session_id)
            if session is not None:
                self._end(session, code, message)

    def _end_overdue(self) -> None:
        now_ms = self._clock_ms()
        while self._deadlines and self._deadlines[0][0] <= now_ms:
            session = self._sessions.get(heapq.heappop(self._deadlines)[1])
            if session is not None and session.deadline_ms <= now_ms:
                waited = "the session's deadline has passed"
                if session.next_position == 0 and session.deadline_ms < session.end_ms:
                    waited = "the session was not started in time"
                self._end(session, ErrorCode.DEADLINE, waited)

    def _forget(self, session: StageSession, reason: str) -> None:
        """KV is free at once; frames still on their way find no session and are dropped."""
        if self._sessions.pop(session.id, None) is None:
            return
        self._num_sessions[session.opening.head] -= 1
        if not self._num_sessions[session.opening.head]:
            del self._num_sessions[session.opening.head]
        self._ready.pop(session.id, None)
        session.waiting.clear()
        session.loaded.cache.close(session.table)
        meter = session.meter
        self._on_event(
            SessionEnded(
                session.id, session.opening.model, meter.num_prompt_tokens, meter.num_output_tokens, reason
            )
        )

    def _set_deadline(self, session: StageSession, deadline_ms: int) -> None:
        """What the heap holds of older deadlines and of ended sessions is swept out as it grows."""
        session.deadline_ms = deadline_ms
        if len(self._deadlines) > 4 * len(self._sessions) + 64:
            self._deadlines = [(other.deadline_ms, other.id) for other in self._sessions.values()]
            heapq.heapify(self._deadlines)
        else:
            heapq.heappush(self._deadlines, (deadline_ms, session.id))

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
        """Some of what was posted, so that steps go on under any flood; with `wait`, sleep until something
        is, a deadline comes or time is up.
        """
        if not wait:
            timeout_s = 0
        elif timeout_s is None and self._deadlines:
            left_s = (self._deadlines[0][0] - self._clock_ms()) / 1000
            timeout_s = min(max(0.0, left_s), MAX_WAIT_S)
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

    def _tell(self, session: StageSession, frame: Frame) -> None:
        """A head that cannot be told has lost its link, and with it this session."""
        problem = self._send_to_head(session.opening.head, frame)
        if problem is not None:
            self._forget(session, f"the head is gone: {problem}")

    def _send_to_head(self, head: bytes, frame: Frame) -> str | None:
        """Why it could not be sent."""
        try:
            self.links.send_to_head(head, frame)
        except (LinkDown, LinkFull) as error:
            log.info("the head could not be told: %s", error)
            return str(error)
        return None


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
