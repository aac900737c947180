"""What this node's stages have against heads, written into the ledger for all to see. Moves no credit.

Bounded: of one head so many an hour and of all together so many, so that nobody fills this node's journal.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

from ledger.entry import Disputed, DisputeReason
from ledger.journal import JournalError
from ledger.ledger import LedgerError
from ledger.receipt import ReceiptError, SignedReceipt, verify_head, verify_stage
from node.engine.events import WorkDisputed
from node.ledger_thread import LedgerThread

log = logging.getLogger(__name__)

WINDOW_S = 3600.0
MAX_NUM_PER_HEAD = 4
MAX_NUM_PER_WINDOW = 32
# Heads are not known by name before a receipt says who signed it.
_UNKNOWN_HEAD = b""


class Disputes:
    def __init__(
        self, node: bytes, ledger: LedgerThread, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._node = node
        self._ledger = ledger
        self._clock_s = clock_s
        self._window_began_s = clock_s()
        self._num_of_head: Counter[bytes] = Counter()
        self.num_left_out = 0

    async def record(self, event: WorkDisputed) -> bool:
        """Whether it was written; False when there have been too many, or the ledger refuses."""
        receipt = self._evidence(event)
        if not self._may_write(receipt.receipt.head if receipt is not None else _UNKNOWN_HEAD):
            self.num_left_out += 1
            return False
        dispute = Disputed(event.session, DisputeReason(event.reason), receipt)
        try:
            await self._ledger.append(dispute)
        except (LedgerError, JournalError) as error:
            log.warning("a dispute over session %s cannot be written: %s", event.session.hex(), error)
            return False
        return True

    def _evidence(self, event: WorkDisputed) -> SignedReceipt | None:
        """The receipt, if its head did sign it, and for this session and node."""
        try:
            signed = SignedReceipt.decode(event.receipt)
            verify_head(signed)
            if signed.is_co_signed:
                verify_stage(signed)
        except ReceiptError:
            return None
        is_ours = (signed.receipt.stage, signed.receipt.session) == (self._node, event.session)
        return signed if is_ours else None

    def _may_write(self, head: bytes) -> bool:
        if self._clock_s() - self._window_began_s >= WINDOW_S:
            self._window_began_s = self._clock_s()
            self._num_of_head.clear()
        if self._num_of_head[head] >= MAX_NUM_PER_HEAD or self._num_of_head.total() >= MAX_NUM_PER_WINDOW:
            return False
        self._num_of_head[head] += 1
        return True
