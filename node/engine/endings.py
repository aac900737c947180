"""How sessions end, and what their heads are told. KV is free at once; later frames find no session.

A session that is preempted, or whose neighbour is lost, is kept without KV for a while: its head still signs
for what it was given.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from ledger.entry import DisputeReason
from node.engine.events import EngineEvent, SessionEnded, WorkDisputed
from node.engine.session import StageSession
from node.engine.session_book import SessionBook
from node.engine.unpaid import Unpaid
from node.links.frames import ErrorCode, Frame, SessionError
from node.links.port import LinkDown, LinkFull, StageLinks

log = logging.getLogger(__name__)

MAX_SET_ASIDE_MS = 30_000
# A head signs for what its client has read; one that reads nothing is given up within a minute.
MAX_UNSIGNED_MS = 120_000
# The head could not sign any more, and may have to replay.
_OWN_FAULTS = frozenset({ErrorCode.INTERNAL, ErrorCode.SHUTTING_DOWN})


class Endings:
    def __init__(
        self,
        book: SessionBook,
        links: StageLinks,
        on_event: Callable[[EngineEvent], None],
        clock_ms: Callable[[], int],
    ) -> None:
        self._book = book
        self._links = links
        self._on_event = on_event
        self._clock_ms = clock_ms
        self.unpaid = Unpaid(clock_ms)

    def end(self, session: StageSession, code: ErrorCode, message: str) -> None:
        error = SessionError(session.id, session.opening.stage_index, code, message)
        self.send_to_head(session.head, error)
        if code in _OWN_FAULTS:
            self.unpaid.interrupted(session.head, session.next_position)
        self._forget(session, message, is_unpaid=code not in _OWN_FAULTS)

    def end_all(self, sessions: Iterable[bytes], code: ErrorCode, message: str) -> None:
        for session_id in sessions:
            session = self._book.sessions.get(session_id)
            if session is not None:
                self.end(session, code, message)

    def end_overdue(self) -> None:
        for session in self._book.overdue(self._clock_ms()):
            if session.is_set_aside:
                self.forget(session, "the head did not close it")
                continue
            if session.is_paused and session.deadline_ms < session.end_ms:
                self._end_unsigned(session)
                continue
            waited = "the session's deadline has passed"
            if not session.has_begun and session.deadline_ms < session.end_ms:
                waited = "the session was not started in time"
            self.end(session, ErrorCode.DEADLINE, waited)

    def wait_for_signature(self, session: StageSession) -> None:
        """Nothing more of it runs before its head signs; not for ever."""
        self._book.pause(session)
        self._book.set_deadline(session, min(session.end_ms, self._clock_ms() + MAX_UNSIGNED_MS))

    def signed(self, session: StageSession, num_tokens: int) -> None:
        """For so many more tokens than before."""
        self.unpaid.signed(session.head, num_tokens)
        if session.is_paused and not session.is_set_aside and not session.meter.is_at_limit:
            self._book.set_deadline(session, session.end_ms)
            self._book.resume(session)

    def dispute(self, session: StageSession, reason: DisputeReason, receipt: bytes, message: str) -> None:
        """End it, and have it written down, once."""
        if session.id not in self._book.sessions:
            return
        is_unsigned = reason is DisputeReason.UNSIGNED_LIMIT
        code = ErrorCode.UNSIGNED_LIMIT if is_unsigned else ErrorCode.DISPUTED_RECEIPT
        self._on_event(WorkDisputed(session.id, int(reason), receipt))
        self.end(session, code, message)

    def _end_unsigned(self, session: StageSession) -> None:
        meter = session.meter
        message = f"the head signed for {meter.num_signed_output_tokens} of {meter.num_output_tokens} tokens"
        self.dispute(session, DisputeReason.UNSIGNED_LIMIT, meter.last_receipt, message)

    def set_aside(self, session: StageSession, code: ErrorCode, message: str) -> None:
        """The head replays it elsewhere or later, and signs for what was done here."""
        if not session.is_set_aside:
            session.set_aside()
        self._book.quiet(session)
        deadline_ms = min(session.end_ms, self._clock_ms() + MAX_SET_ASIDE_MS)
        self._book.set_deadline(session, deadline_ms)
        self.tell(session, SessionError(session.id, session.opening.stage_index, code, message))

    def set_aside_all(self, sessions: Iterable[bytes], code: ErrorCode, message: str) -> None:
        for session_id in sessions:
            session = self._book.sessions.get(session_id)
            if session is not None and not session.is_set_aside:
                self.set_aside(session, code, message)

    def forget(self, session: StageSession, reason: str) -> None:
        """`reason` is empty when the head closed it."""
        self._forget(session, reason, is_unpaid=True)

    def _forget(self, session: StageSession, reason: str, is_unpaid: bool) -> None:
        """`is_unpaid`: what is not signed for by now, the head has had for nothing."""
        if not self._book.remove(session):
            return
        session.loaded.cache.close(session.table)
        meter = session.meter
        if is_unpaid and meter.num_output_tokens:
            self.unpaid.lost(session.head, meter.num_computed_tokens - meter.num_signed_tokens)
        self._on_event(
            SessionEnded(
                session.id,
                session.opening.model,
                meter.num_prompt_tokens,
                meter.num_kept_output_tokens,
                reason,
            )
        )

    def tell(self, session: StageSession, frame: Frame) -> None:
        """A head that cannot be told has lost its link, and with it this session."""
        problem = self.send_to_head(session.head, frame)
        if problem is not None:
            self.forget(session, f"the head is gone: {problem}")

    def send_to_head(self, head: bytes, frame: Frame) -> str | None:
        """Why it could not be sent."""
        try:
            self._links.send_to_head(head, frame)
        except (LinkDown, LinkFull) as error:
            log.info("the head could not be told: %s", error)
            return str(error)
        return None
