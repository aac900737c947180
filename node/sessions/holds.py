"""The holds of a head: opened before work begins, each settled or voided once, whoever stops waiting.

Knows the ledger and what an attempt gave; routes and stages are the opener's business.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from ledger.entry import HoldSettled, HoldVoided, VoidReason
from ledger.journal import JournalError
from ledger.ledger import LedgerError
from node.gateway.backend import GenerationFailed, Usage
from node.ledger_thread import LedgerThread
from node.sessions.attempt import Attempt
from node.sessions.terms import SessionTerms

log = logging.getLogger(__name__)


class Holds:
    def __init__(self, node: bytes, ledger: LedgerThread) -> None:
        self._node = node
        self._ledger = ledger
        self._endings: set[asyncio.Task[Usage]] = set()

    async def open(self, terms: SessionTerms) -> None:
        """Open the hold. Whoever stops waiting leaves none open: what was queued is written, then voided.

        Raises GenerationFailed when the books cannot be written.
        """
        opening = asyncio.ensure_future(self._ledger.append(terms.hold()))
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            await self._own(self._void_after(opening, terms.session))
            raise
        except JournalError as error:
            raise _unwritable(error) from None

    async def _void_after(self, opening: asyncio.Future[Any], session: bytes) -> Usage:
        await asyncio.wait([opening])
        if opening.exception() is None:
            await self._ledger.append(HoldVoided(session, VoidReason.CANCELLED))
        return Usage(0, 0, 0)

    async def void(self, session: bytes) -> None:
        await self._own(self._void(session))

    async def _void(self, session: bytes) -> Usage:
        await self._ledger.append(HoldVoided(session, VoidReason.FAILED))
        return Usage(0, 0, 0)

    def end(self, attempt: Attempt, num_output_tokens: int, failed: bool) -> asyncio.Future[Usage]:
        """Settle what was delivered, void when that is nothing; see `HeadSession.settle`."""
        return self._start(self._finish(attempt, num_output_tokens, failed))

    async def _finish(self, attempt: Attempt, num_output_tokens: int, failed: bool) -> Usage:
        terms = attempt.terms
        # A stage signs no count below its last one: what was signed is the least that is settled.
        num_output_tokens = max(num_output_tokens, attempt.num_signed_tokens)
        try:
            if num_output_tokens == 0:
                attempt.close_stages()
                reason = VoidReason.FAILED if failed else VoidReason.CANCELLED
                await self._ledger.append(HoldVoided(terms.session, reason))
                return Usage(0, 0, 0)
            receipts = await attempt.collect_receipts(num_output_tokens)
            num_prompt_tokens, num_cached_tokens = terms.num_charged_prompt_tokens, attempt.num_cached_tokens
            settled = HoldSettled(
                terms.session, num_prompt_tokens, num_cached_tokens, num_output_tokens, receipts
            )
            await self._settle(settled)
            return Usage(num_prompt_tokens, num_cached_tokens, num_output_tokens)
        except JournalError as error:
            raise _unwritable(error) from None
        finally:
            attempt.release()

    async def _settle(self, settled: HoldSettled) -> None:
        """A settlement that breaks a rule would leave the hold open: then the stages claim for themselves."""
        try:
            await self._ledger.append(settled)
        except LedgerError:
            await self._ledger.append(HoldVoided(settled.session, VoidReason.FAILED))
            raise

    async def _own(self, work: Coroutine[Any, Any, Usage]) -> Usage:
        """Run to the end even if the caller is cancelled: books are never left half written."""
        return await asyncio.shield(self._start(work))

    def _start(self, work: Coroutine[Any, Any, Usage]) -> asyncio.Task[Usage]:
        task = asyncio.create_task(work)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)
        return task

    async def recover(self) -> int:
        """Void the holds that this node's earlier life left open. Returns how many."""
        mine = await self._ledger.run(
            lambda ledger: [hold for hold in ledger.open_holds() if hold.author == self._node]
        )
        for hold in mine:
            await self._ledger.append(HoldVoided(hold.session, VoidReason.FAILED))
        return len(mine)

    async def close(self, timeout_s: float) -> None:
        """Wait for endings that are being written."""
        if self._endings:
            await asyncio.wait(set(self._endings), timeout=timeout_s)


def _unwritable(error: JournalError) -> GenerationFailed:
    """The log says why; a client is told nothing of databases."""
    log.error("a request cannot be written down: %s", error)
    return GenerationFailed("this node cannot write its books now; ask another node or try again later")
