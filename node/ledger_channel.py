"""The ledger as a replicated channel: the bytes nodes exchange are `ledger.sync`'s, the exchange is gossip's.

Reading happens on the event loop (short, indexed), taking in on the ledger's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from ledger.sync import decode_batch, decode_heads, encode_batch, encode_heads
from node.ledger_thread import LedgerThread

log = logging.getLogger(__name__)

MAX_PIECE_BYTES = 192 * 1024


class LedgerChannel:
    name = "ledger"

    def __init__(self, ledger: LedgerThread, on_change: Callable[[], None]) -> None:
        self._ledger = ledger
        self._on_change = on_change
        self.on_fork: Callable[[], None] = lambda: None

    def digest(self) -> bytes:
        return self._ledger.ledger.digest()

    def summary(self) -> bytes:
        return encode_heads(self._ledger.ledger.heads())

    def missing(self, summary: bytes) -> tuple[bytes, bool]:
        raws, more = self._ledger.ledger.missing(decode_heads(summary), MAX_PIECE_BYTES)
        return (encode_batch(raws) if raws else b""), more

    async def ingest(self, peer: bytes, payload: bytes) -> int:
        if not payload:
            return 0
        raws = decode_batch(payload)
        result = await self._ledger.run(lambda ledger: ledger.ingest(raws))
        for refused in result.refused[:3]:
            log.info("an entry from %s was refused: %s", peer.hex()[:8], refused)
        for fork in result.forks:
            log.warning("a fork: node %s signed two entries %d", fork.author.hex()[:8], fork.index)
        if result.forks:
            self.on_fork()
        if result.num_new:
            self._on_change()
        return result.num_new
