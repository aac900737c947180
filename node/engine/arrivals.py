"""What arrives for an engine: frames of heads and stages, links that go down, dials that are done.

Each is checked against the session it names and becomes its next input, its opening or its end. Runs on the
loop thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from ledger.entry import DisputeReason
from ledger.receipt import Dispute, Sign, WrongTerms
from node.engine.admission import Admission
from node.engine.dialler import Dial, Dialler
from node.engine.endings import Endings
from node.engine.events import EngineEvent, ReceiptHeld
from node.engine.hidden_rows import are_finite, rows_tensor
from node.engine.opening import NoRoom, Refusal, packed_ids
from node.engine.session import BadFrame, StageSession
from node.engine.session_book import SessionBook
from node.engine.waiting_room import WaitingRoom
from node.links.frames import (
    CloseSession,
    ErrorCode,
    Frame,
    HiddenBatch,
    Malformed,
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
from node.links.port import LinkDown, StageLinks

log = logging.getLogger(__name__)

MAX_UNSTARTED_MS = 30_000
# The rows of a later stage may stand behind other prompts at the stages before it.
MAX_UNFED_MS = 600_000


class Arrivals:
    def __init__(
        self,
        book: SessionBook,
        admission: Admission,
        endings: Endings,
        dialler: Dialler,
        links: StageLinks,
        sign: Sign,
        on_event: Callable[[EngineEvent], None],
        clock_ms: Callable[[], int],
    ) -> None:
        self._book = book
        self._admission = admission
        self._endings = endings
        self._dialler = dialler
        self._links = links
        self._sign = sign
        self._on_event = on_event
        self._clock_ms = clock_ms
        self._waiting_room = WaitingRoom()

    def frame(self, peer: bytes, frame: Frame) -> None:
        match frame:
            case HiddenBatch():
                self._hidden(peer, frame)
            case TokenBatch():
                self._tokens(peer, frame)
            case Malformed():
                self._malformed(peer, frame)
            case OpenSession():
                self._open(peer, frame)
            case StartSession() | CloseSession() | SignReceipt():
                session = self._book.sessions.get(frame.session)
                if session is not None and session.head == peer:
                    self._head_said(session, frame)
                elif isinstance(frame, CloseSession):
                    self._waiting_room.remove(peer, frame.session)
            case _:
                log.warning("a %s is nothing a stage takes", type(frame).__name__)

    def picked(self, session: StageSession, position: int, token_ids: Sequence[int]) -> None:
        """Tokens of a session that is here alone: its next input."""
        self._go_on(session, position, token_ids, time.perf_counter())

    def _hidden(self, peer: bytes, frame: HiddenBatch) -> None:
        rows_TD, row, now_s = rows_tensor(frame), 0, time.perf_counter()
        is_sound = are_finite(rows_TD, frame.hidden_size)
        for item in frame.items:
            session = self._book.sessions.get(item.session)
            first, row = row, row + item.num_tokens
            if session is None or session.is_first_stage or session.previous_node != peer:
                continue
            if frame.hidden_size != session.loaded.manifest.hidden_size:
                message = f"rows of {frame.hidden_size} values are not this model's"
                self._endings.end(session, ErrorCode.BAD_FRAME, message)
                continue
            if not is_sound and not are_finite(rows_TD[first:row], frame.hidden_size):
                # In a block of KV that another session is given later they would still do harm.
                self._endings.end(session, ErrorCode.BAD_FRAME, "rows that are no numbers")
                continue
            self._push(session, item.position, item.num_tokens, rows_TD, first, now_s, item.draft_ids)

    def _malformed(self, peer: bytes, frame: Malformed) -> None:
        for session_id in frame.sessions:
            session = self._book.sessions.get(session_id)
            if session is not None and session.previous_node == peer:
                self._endings.end(session, ErrorCode.BAD_FRAME, frame.reason)

    def _tokens(self, peer: bytes, frame: TokenBatch) -> None:
        now_s = time.perf_counter()
        for session_id, (position, token_ids) in _runs(frame.items).items():
            session = self._book.sessions.get(session_id)
            if session is None or not session.is_first_stage or session.previous_node != peer:
                continue
            try:
                session.confirm(position, token_ids)
            except BadFrame as error:
                self._endings.end(session, ErrorCode.BAD_FRAME, str(error))
                continue
            self._go_on(session, position, token_ids, now_s)

    def _go_on(
        self, session: StageSession, position: int, token_ids: Sequence[int], arrived_s: float
    ) -> None:
        """The first stage's next input: the last token that was picked, and guesses of what follows it."""
        source: Sequence[int] = token_ids[-1:]
        draft_ids: tuple[int, ...] = ()
        position += len(token_ids) - 1
        speculation = session.speculation
        if speculation is not None and not session.is_set_aside:
            speculation.tokens_came(token_ids, len(session.draft_ids), arrived_s)
            draft_ids = speculation.propose(session.pass_costs(), session.num_spare_rows(position))
            source = (*source, *draft_ids)
        self._push(session, position, len(source), source, 0, arrived_s, draft_ids)

    def _push(
        self,
        session: StageSession,
        position: int,
        num_tokens: int,
        source: Sequence[int] | Tensor,
        row: int,
        arrived_s: float,
        draft_ids: tuple[int, ...] = (),
    ) -> None:
        if session.is_set_aside:
            return
        is_first = not session.has_begun
        try:
            session.push(position, num_tokens, source, row, arrived_s, draft_ids)
        except BadFrame as error:
            self._endings.end(session, ErrorCode.BAD_FRAME, str(error))
            return
        self._book.make_ready(session)
        if is_first:
            self._book.set_deadline(session, session.end_ms)

    def _open(self, peer: bytes, opening: OpenSession) -> None:
        if opening.session in self._book.sessions or opening.session in self._waiting_room:
            return
        try:
            self._endings.unpaid.check(peer, opening)
            candidate = self._admission.check(peer, opening)
            session = self._admission.take(candidate)
        except NoRoom as refusal:
            if not self._waiting_room.add(candidate, self._clock_ms()):
                self._refuse(opening, refusal)
            return
        except Refusal as refusal:
            self._refuse(opening, refusal, peer)
            return
        self._opened(session)

    def admit_waiting(self) -> None:
        """Whoever waits for room, in the order of their counters."""
        refused = self._waiting_room.admit(
            lambda candidate: self._opened(self._admission.take(candidate)),
            self._admission.rank,
            self._clock_ms(),
            self._book.num_quieted,
        )
        for candidate, refusal in refused:
            self._refuse(candidate.opening, refusal)

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting_room)

    def _refuse(self, opening: OpenSession, refusal: Refusal, peer: bytes | None = None) -> None:
        error = SessionError(opening.session, opening.stage_index, refusal.code, str(refusal))
        self._endings.send_to_head(peer or opening.head, error)

    def _opened(self, session: StageSession) -> None:
        self._endings.unpaid.admitted(session.opening)
        self._book.add(session)
        wait_ms = MAX_UNSTARTED_MS if session.is_first_stage else MAX_UNFED_MS
        self._book.set_deadline(session, min(session.end_ms, self._clock_ms() + wait_ms))
        self._connect_next_hop(session)

    def _connect_next_hop(self, session: StageSession) -> None:
        """The head is told that the session is open when the hop is there, at once if it is already."""
        opening = session.opening
        if len(opening.route) == 1 or self._links.is_connected(session.next_node):
            opened = SessionOpened(session.id, opening.stage_index, session.num_cached_tokens)
            self._endings.tell(session, opened)
            return
        try:
            self._dialler.request(opening.head, session.id, session.next_stage)
        except LinkDown as error:
            self._hop_is_unreachable(session, str(error))

    def dialled(self, dial: Dial, problem: str | None) -> None:
        for session_id in self._dialler.finish(dial):
            session = self._book.sessions.get(session_id)
            if session is None:
                continue
            if problem is not None:
                self._hop_is_unreachable(session, problem)
            else:
                self._connect_next_hop(session)

    def _hop_is_unreachable(self, session: StageSession, problem: str) -> None:
        message = f"the next stage is unreachable: {problem}"
        self._endings.end(session, ErrorCode.NEXT_HOP_UNREACHABLE, message)

    def _head_said(self, session: StageSession, frame: StartSession | CloseSession | SignReceipt) -> None:
        match frame:
            case StartSession():
                if session.is_first_stage and not session.has_begun:
                    self._start(session, frame.num_cached_tokens)
            case SignReceipt():
                self._sign_receipt(session, frame.receipt)
            case CloseSession():
                self._endings.send_to_head(session.head, self._timing(session))
                self._endings.forget(session, "")

    def _start(self, session: StageSession, num_cached_tokens: int) -> None:
        prompt_ids, session.prompt_ids = session.prompt_ids, packed_ids(())
        num_tokens = len(prompt_ids) - num_cached_tokens
        if num_tokens < 1:
            message = "a session begins before the end of its prompt"
            self._endings.end(session, ErrorCode.BAD_FRAME, message)
            return
        session.speculate_after(prompt_ids)
        now_s = time.perf_counter()
        self._push(session, num_cached_tokens, num_tokens, prompt_ids, num_cached_tokens, now_s)

    def _sign_receipt(self, session: StageSession, raw: bytes) -> None:
        num_signed_before = session.meter.num_signed_tokens
        try:
            receipt = session.meter.co_sign(raw, self._sign)
            if receipt is None:
                return
        except Dispute as dispute:
            is_terms = isinstance(dispute, WrongTerms)
            reason = DisputeReason.TERMS if is_terms else DisputeReason.COUNTS
            self._endings.dispute(session, reason, raw, str(dispute))
            return
        self._on_event(ReceiptHeld(session.id, receipt))
        self._endings.signed(session, session.meter.num_signed_tokens - num_signed_before)
        self._endings.tell(session, ReceiptSigned(session.id, receipt))

    def link_down(self, peer: bytes, reason: str) -> None:
        message = f"a neighbour in the route is gone: {reason}"
        for session in list(self._book.sessions.values()):
            is_cut = len(session.opening.route) > 1 and peer in (session.next_node, session.previous_node)
            if is_cut and not session.is_set_aside:
                self._endings.set_aside(session, ErrorCode.NEXT_HOP_UNREACHABLE, message)

    def head_down(self, head: bytes, reason: str) -> None:
        self._waiting_room.remove(head)
        for session in list(self._book.sessions.values()):
            if session.head == head:
                self._endings.forget(session, f"the head is gone: {reason}")

    def _timing(self, session: StageSession) -> StageTiming:
        return StageTiming(
            session.id,
            session.opening.stage_index,
            session.num_steps,
            int(session.compute_s * 1e6),
            int(session.queue_s * 1e6),
            0 if len(session.opening.route) == 1 else self._links.link_us(session.next_node),
        )


def _runs(items: Iterable[TokenItem]) -> dict[bytes, tuple[int, list[int]]]:
    """By session: where its first token stands, and its tokens. Items after a gap are left out."""
    runs: dict[bytes, tuple[int, list[int]]] = {}
    for item in items:
        position, token_ids = runs.setdefault(item.session, (item.position, []))
        if item.position == position + len(token_ids):
            token_ids.append(item.token_id)
    return runs
