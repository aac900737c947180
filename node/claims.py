"""Receipts this node's stages co-signed, kept until they count; claimed when their head lets them down.

A head may vanish (its hold expires), settle without them, or hold far beyond its deadline: then the stage
presents the head's own signature. A void does not undo what was signed: a head voids what gave nothing, and
signs for nothing before the first token. A head that signs without a hold to pay from is remembered: no more
work for it. In memory and bounded; knows no engine.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial

from ledger.entry import ReceiptClaimed
from ledger.journal import JournalError
from ledger.ledger import Ledger, LedgerError
from ledger.receipt import Receipt, ReceiptError, SignedReceipt
from ledger.session_record import SessionState
from node.ledger_thread import LedgerThread
from node.sessions.head import HOLD_GRACE_S, SESSION_DEADLINE_S

log = logging.getLogger(__name__)

MAX_NUM_RECEIPTS = 10_000
# By then an honest head has settled or its hold has expired, and its entries have travelled.
PATIENCE_S = SESSION_DEADLINE_S + 2 * HOLD_GRACE_S
# A hold is written before the work begins and told at once; by then it has come, where it can come at all.
HOLD_ARRIVES_S = 60.0
# Of so many sessions at once without a hold that covers them, an honest head has none.
MAX_NUM_UNCOVERED = 8


class _Verdict(Enum):
    WAIT = "wait"
    FORGET = "forget"
    CLAIM = "claim"


@dataclass(frozen=True, slots=True)
class _Held:
    """`since_s` is when the first receipt of this session's stage came."""

    signed: SignedReceipt
    since_s: float


class Claims:
    def __init__(self, ledger: LedgerThread, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._clock_s = clock_s
        self._held: OrderedDict[tuple[bytes, bytes, int], _Held] = OrderedDict()
        self._num_lost: Counter[bytes] = Counter()
        self.unpaying_heads: frozenset[bytes] = frozenset()

    @property
    def num_held(self) -> int:
        return len(self._held)

    def hold(self, raw: bytes) -> None:
        """Keep the newest receipt of a session's stage."""
        try:
            signed = SignedReceipt.decode(raw)
        except ReceiptError as error:
            log.warning("the engine held what is no receipt: %s", error)
            return
        receipt = signed.receipt
        place = (receipt.head, receipt.session, receipt.stage_index)
        known = self._held.get(place)
        self._held[place] = _Held(signed, known.since_s if known else self._clock_s())
        while len(self._held) > MAX_NUM_RECEIPTS:
            self._held.popitem(last=False)

    async def check(self) -> int:
        """Forget what counts, claim what is due, see who holds nothing. Returns how many were claimed."""
        num_claimed = 0
        num_uncovered: Counter[bytes] = Counter()
        for place, held in list(self._held.items()):
            receipt = held.signed.receipt
            is_overdue = self._clock_s() - held.since_s > PATIENCE_S
            is_awaited = self._clock_s() - held.since_s <= HOLD_ARRIVES_S
            is_covered = is_awaited or await self._ledger.run(partial(_covers, receipt))
            verdict = await self._ledger.run(partial(_verdict, held.signed, is_overdue))
            is_claimed = verdict is _Verdict.CLAIM and await self._claim(held.signed)
            num_claimed += is_claimed
            is_done = is_claimed or verdict is _Verdict.FORGET or (is_overdue and verdict is _Verdict.CLAIM)
            # While the ledger was asked the engine may have held a newer one.
            if not is_covered:
                (self._num_lost if is_done else num_uncovered)[receipt.head] += 1
            if is_done and self._held.get(place) is held:
                del self._held[place]
        self.unpaying_heads = frozenset(
            head
            for head in self._num_lost.keys() | num_uncovered.keys()
            if self._num_lost[head] + num_uncovered[head] >= MAX_NUM_UNCOVERED
        )
        return num_claimed

    async def _claim(self, signed: SignedReceipt) -> bool:
        try:
            await self._ledger.append(ReceiptClaimed(signed))
        except (LedgerError, JournalError) as error:
            log.warning("a receipt of session %s cannot be claimed: %s", signed.receipt.session.hex(), error)
            return False
        return True


def _covers(receipt: Receipt, ledger: Ledger) -> bool:
    return ledger.covers(receipt)


def _verdict(signed: SignedReceipt, is_overdue: bool, ledger: Ledger) -> _Verdict:
    if ledger.is_paid(signed.receipt):
        return _Verdict.FORGET
    summary = ledger.session(signed.receipt.head, signed.receipt.session)
    match summary.state if summary is not None else None:
        case None | SessionState.CLAIMED:
            # The head never opened a hold, or its entries have not arrived here.
            return _Verdict.FORGET if is_overdue else _Verdict.WAIT
        case SessionState.OPEN:
            return _Verdict.CLAIM if is_overdue else _Verdict.WAIT
        case _:
            return _Verdict.CLAIM
