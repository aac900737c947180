"""The head: every request of this node's gateway, from its hold to its settlement.

Opening is `opener.py`'s business, the books are `holds.py`'s, a running session's tokens `session.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ledger.rate_card import PER_MILLE, RateCard
from ledger.receipt import Sign
from node.gateway.backend import NoRoute
from node.ledger_thread import LedgerThread
from node.links.frames import MAX_NUM_DRAFT_TOKENS
from node.links.head_links import HeadLinks
from node.sessions.attempt import Attempt
from node.sessions.holds import Holds
from node.sessions.opener import CheckCredit, FindRoute, Opener, Opening
from node.sessions.opener import SessionRequest as SessionRequest
from node.sessions.session import HeadSession
from node.sessions.terms import HOLD_GRACE_S as HOLD_GRACE_S
from node.sessions.waiting_line import WaitingLine
from node.token_counter import TokenCounter

SESSION_DEADLINE_S = 30 * 60
MAX_NUM_SESSIONS = 1024


class Head:
    """Every session of this node's gateway, from hold to settlement."""

    def __init__(
        self,
        *,
        pod: bytes,
        node: bytes,
        sign: Sign,
        links: HeadLinks,
        ledger: LedgerThread,
        find_route: FindRoute,
        clock_ms: Callable[[], int],
        max_num_draft_tokens: int = MAX_NUM_DRAFT_TOKENS,
        weight_of: Callable[[bytes], int] = lambda member: PER_MILLE,
        own_member: Callable[[], bytes | None] = lambda: None,
        check_credit: CheckCredit = lambda member: None,
    ) -> None:
        """`max_num_draft_tokens`: how many tokens a step may guess ahead; 0 is no speculation. `weight_of`
        (per mille) and `own_member` order who waits; `check_credit` refuses who may not.
        """
        self._counter = TokenCounter(weight_of)
        self._line = WaitingLine(self._counter, own_member)
        self._clock_ms = clock_ms
        self._holds = Holds(node, ledger)
        self._opener = Opener(
            pod=pod,
            node=node,
            sign=sign,
            links=links,
            holds=self._holds,
            find_route=find_route,
            clock_ms=clock_ms,
            max_num_draft_tokens=max_num_draft_tokens,
            line=self._line,
            check_credit=check_credit,
        )
        self._sessions: set[bytes] = set()

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    async def open(self, request: SessionRequest, rate_card: RateCard) -> HeadSession:
        """Route, stages, hold, start. Raises NoRoute, QuotaExceeded or WaitedTooLong with nothing left open;
        cancelled, likewise."""
        if len(self._sessions) >= MAX_NUM_SESSIONS:
            raise NoRoute(f"this node already runs {MAX_NUM_SESSIONS} requests")
        opening = Opening(request, rate_card, self._clock_ms() + SESSION_DEADLINE_S * 1000)
        attempt = await self._opener.open(opening)
        session_id = attempt.terms.session
        self._sessions.add(session_id)

        def ended() -> None:
            self._sessions.discard(session_id)
            self._counter.charge(request.payer, len(request.prompt_ids) + len(session.token_ids))

        session = HeadSession(attempt, partial(self._replay, opening), self._holds.end, ended)
        return session

    async def _replay(self, opening: Opening, token_ids: tuple[int, ...], suspect: bytes | None) -> Attempt:
        """The same request again after `token_ids`, not over `suspect`. Raises NoRoute."""
        again = replace(
            opening,
            token_ids=token_ids,
            avoided=frozenset(() if suspect is None else (suspect,)),
            wait_for_room_s=(opening.deadline_ms - self._clock_ms()) / 1000,
        )
        return await self._opener.open(again)

    async def recover(self) -> int:
        """Void the holds that this node's earlier life left open. Returns how many."""
        return await self._holds.recover()

    async def close(self, timeout_s: float) -> None:
        """Wait for endings that are being written."""
        await self._holds.close(timeout_s)
