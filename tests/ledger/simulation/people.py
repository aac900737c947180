"""Who is in a simulated pod: keys made once, a directory that knows who was shown which member's API key."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256

import ledger.entry
import ledger.receipt
from ledger.entry import HoldOpened
from ledger.rate_card import DEFAULT_RATE_CARD, RateCard
from tests.ledger.world import FakeDirectory, Key

# Periods short enough that some end within a run.
CARD = replace(DEFAULT_RATE_CARD, dividend_period_s=1_800)

MAX_NUM_REMEMBERED = 200_000

Verify = Callable[[bytes, bytes, bytes], bool]


@cache
def key_of(name: str) -> Key:
    return Key(f"simulated {name}")


@dataclass
class PodDirectory(FakeDirectory):
    """Charging another member's account takes the proof that its API key was shown to this very node."""

    cards: dict[int, RateCard] = field(default_factory=lambda: {1: CARD})

    def may_charge(self, node: bytes, hold: HoldOpened) -> bool:
        return hold.payer in self.members.values() and hold.authorization == shown_key(node, hold)


def shown_key(node: bytes, hold: HoldOpened) -> bytes:
    """What only the bearer of the payer's API key can make, for one hold at one node."""
    terms = (node, hold.session, hold.payer, hold.key_id, hold.amount_microcredits.to_bytes(8, "big"))
    return sha256(b"".join((b"made with the key", *terms))).digest()


@contextmanager
def each_signature_checked_once() -> Iterator[None]:
    """All replicas of one process check the same signatures: the answer of the first is kept for the others.

    The check itself stays the real one, Ed25519 over the real bytes.
    """
    really_check: Verify = ledger.receipt.is_signed_by
    known: OrderedDict[tuple[bytes, bytes, bytes], bool] = OrderedDict()

    def check(public_key: bytes, signature: bytes, message: bytes) -> bool:
        asked = (public_key, signature, message)
        if asked not in known:
            known[asked] = really_check(public_key, signature, message)
            if len(known) > MAX_NUM_REMEMBERED:
                known.popitem(last=False)
        return known[asked]

    places = [module for module in (ledger.entry, ledger.receipt) if hasattr(module, "is_signed_by")]
    for module in places:
        module.is_signed_by = check  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in places:
            module.is_signed_by = really_check  # type: ignore[attr-defined]
