"""Receipts this node's stages co-signed, kept until their head has settled; claimed when it never does.

A head that vanished leaves a hold that expires: then the stage presents the head's own signature. Voided
requests are not claimed. Kept in memory and bounded; knows no engine.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from functools import partial

from ledger.entry import ReceiptClaimed
from ledger.ledger import Ledger
from ledger.receipt import ReceiptError, SignedReceipt
from ledger.session_record import SessionState
from node.ledger_thread import LedgerThread

log = logging.getLogger(__name__)

MAX_NUM_RECEIPTS = 10_000


class Claims:
    def __init__(self, ledger: LedgerThread) -> None:
        self._ledger = ledger
        self._held: OrderedDict[tuple[bytes, bytes, int], SignedReceipt] = OrderedDict()

    def hold(self, raw: bytes) -> None:
        """Keep the newest receipt of a session's stage."""
        try:
            signed = SignedReceipt.decode(raw)
        except ReceiptError as error:
            log.warning("the engine held what is no receipt: %s", error)
            return
        receipt = signed.receipt
        self._held[(receipt.head, receipt.session, receipt.stage_index)] = signed
        while len(self._held) > MAX_NUM_RECEIPTS:
            self._held.popitem(last=False)

    async def check(self) -> int:
        """Forget what is settled or voided, claim what has expired. Returns how many were claimed."""
        num_claimed = 0
        for place, signed in list(self._held.items()):
            state = await self._ledger.run(partial(_state, signed))
            if state is SessionState.OPEN:
                continue
            self._held.pop(place, None)
            if state is SessionState.EXPIRED:
                await self._ledger.append(ReceiptClaimed(signed))
                num_claimed += 1
        return num_claimed


def _state(signed: SignedReceipt, ledger: Ledger) -> SessionState:
    """OPEN as well while the head's entries have not arrived here."""
    if ledger.counts(signed.receipt):
        return SessionState.SETTLED
    summary = ledger.session(signed.receipt.head, signed.receipt.session)
    return summary.state if summary is not None else SessionState.OPEN
