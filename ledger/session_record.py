"""What the books know of one inference session: its holds, how they ended, and the receipts that count.

A join of everything said about the session: each method is commutative and idempotent in what it keeps, so
the order in which entries arrive leaves no trace. It knows no balances.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from enum import Enum

from ledger.entry import HoldOpened, HoldSettled, HoldVoided
from ledger.receipt import Receipt, SignedReceipt


class SessionState(Enum):
    OPEN = "open"
    SETTLED = "settled"
    VOIDED = "voided"
    EXPIRED = "expired"
    CLAIMED = "claimed"


@dataclass(frozen=True, slots=True)
class Hold:
    """An amount of `payer` that head `author` reserved until `expires_at_ms`, at most."""

    author: bytes
    session: bytes
    payer: bytes
    key_id: bytes
    model: bytes
    amount_microcredits: int
    opened_ms: int
    expires_at_ms: int

    @staticmethod
    def of(author: bytes, body: HoldOpened, opened_ms: int) -> Hold:
        return Hold(
            author,
            body.session,
            body.payer,
            body.key_id,
            body.model,
            body.amount_microcredits,
            opened_ms,
            body.expires_at_ms,
        )


@dataclass(frozen=True, slots=True)
class Resolution:
    """The entry that ended the holds of a session. Of several, the first in the author's journal counts."""

    index: int
    hash: bytes
    time_ms: int
    body: HoldSettled | HoldVoided


@dataclass(frozen=True, slots=True)
class Payment:
    """What a receipt moves from its payer: never more than the hold leaves room for.

    `opened_ms` is when the hold was opened; None without one, and then the amount is 0.
    """

    receipt: Receipt
    amount_microcredits: int
    opened_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Consumption:
    """Tokens a payer was given in one session."""

    payer: bytes
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


@dataclass(slots=True)
class SessionRecord:
    """Mutable, owned by `Books`. `holds` is keyed by (payer, key id), `receipts` by (stage index, stage).

    The stage is part of the key because a head could otherwise void one stage's pay by signing a higher
    sequence for another node at the same place in the route.
    """

    head: bytes
    session: bytes
    holds: dict[tuple[bytes, bytes], Hold] = field(default_factory=dict)
    resolution: Resolution | None = None
    receipts: dict[tuple[int, bytes], SignedReceipt] = field(default_factory=dict)
    num_disputes: int = 0

    def add_hold(self, hold: Hold) -> None:
        """Of several of one payer and key (a head that forked), the one that costs the most counts."""
        place = (hold.payer, hold.key_id)
        known = self.holds.get(place)
        if known is None or _hold_rank(hold) > _hold_rank(known):
            self.holds[place] = hold

    def resolve(self, resolution: Resolution) -> None:
        if self.resolution is None or _place(resolution) < _place(self.resolution):
            self.resolution = resolution

    def count(self, signed: SignedReceipt) -> None:
        """Keep the receipt if it outranks the one that counted."""
        place = (signed.receipt.stage_index, signed.receipt.stage)
        counted = self.receipts.get(place)
        if counted is None or receipt_rank(signed.receipt) > receipt_rank(counted.receipt):
            self.receipts[place] = signed

    def counts(self, receipt: Receipt) -> bool:
        counted = self.receipts.get((receipt.stage_index, receipt.stage))
        return counted is not None and counted.receipt == receipt

    def is_paid(self, receipt: Receipt) -> bool:
        """Whether this receipt counts, or one that outranks it: it would add nothing."""
        counted = self.receipts.get((receipt.stage_index, receipt.stage))
        return counted is not None and receipt_rank(counted.receipt) >= receipt_rank(receipt)

    def payments(self) -> dict[tuple[int, bytes], Payment]:
        """What each counting receipt pays: its amount, or its share when all together exceed the hold.

        A share and not a refusal, because which claim came first is not the same on every replica.
        """
        totals: defaultdict[tuple[bytes, bytes], int] = defaultdict(int)
        for signed in self.receipts.values():
            totals[_payer(signed.receipt)] += signed.receipt.amount_microcredits
        payments = {}
        for place, signed in self.receipts.items():
            hold, total = self.holds.get(_payer(signed.receipt)), totals[_payer(signed.receipt)]
            limit = hold.amount_microcredits if hold is not None else 0
            amount = signed.receipt.amount_microcredits
            payments[place] = Payment(
                signed.receipt,
                amount if total <= limit else amount * limit // total,
                hold.opened_ms if hold is not None else None,
            )
        return payments

    def state(self, now_ms: int) -> SessionState:
        """A resolution after the deadline finds an expired hold; its receipts count all the same."""
        if not self.holds:
            return SessionState.CLAIMED
        expires_at_ms = max(hold.expires_at_ms for hold in self.holds.values())
        if self.resolution is None:
            return SessionState.OPEN if now_ms < expires_at_ms else SessionState.EXPIRED
        if self.resolution.time_ms >= expires_at_ms:
            return SessionState.EXPIRED
        is_settled = isinstance(self.resolution.body, HoldSettled)
        return SessionState.SETTLED if is_settled else SessionState.VOIDED

    def consumption(self) -> Consumption | None:
        """What the payer was given: as settled, else the most that any counting receipt says."""
        payers = [payer for payer, _ in self.holds] or [
            signed.receipt.payer for signed in self.receipts.values()
        ]
        body = self.resolution.body if self.resolution is not None else None
        if payers and isinstance(body, HoldSettled):
            return Consumption(
                min(payers), body.num_prompt_tokens, body.num_cached_tokens, body.num_output_tokens
            )
        if not self.receipts:
            return None
        receipts = [signed.receipt for signed in self.receipts.values()]
        return Consumption(
            min(payers),
            max(receipt.num_prompt_tokens for receipt in receipts),
            max(receipt.num_cached_tokens for receipt in receipts),
            max(receipt.num_output_tokens for receipt in receipts),
        )


def receipt_rank(receipt: Receipt) -> tuple[int, int, bytes]:
    """The highest sequence counts; a head that signs one sequence twice pays the higher of the two."""
    return receipt.sequence, receipt.amount_microcredits, receipt.encode()


def _payer(receipt: Receipt) -> tuple[bytes, bytes]:
    return receipt.payer, receipt.key_id


def _hold_rank(hold: Hold) -> tuple[int, int, int, bytes, bytes]:
    return hold.amount_microcredits, hold.expires_at_ms, hold.opened_ms, hold.key_id, hold.model


def _place(resolution: Resolution) -> tuple[int, bytes]:
    return resolution.index, resolution.hash
