"""Journals of any length for `ledger.py`: requests of one head with one stage each, held and settled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ledger.entry import FIRST_PREV_HASH, Entry, HoldOpened, HoldSettled, sign_entry
from ledger.rate_card import DEFAULT_RATE_CARD, RateCard
from ledger.receipt import Receipt, Sign, SignedReceipt, co_sign, expected_amount, sign_as_head

START_MS = 1_790_000_000_000
INTERVAL_MS = 500
MODEL, KEY_ID = b"M" * 32, b"K" * 16
NUM_PARAMETERS = 134_500_000
HELD_MICROCREDITS = 10_000_000


class Key:
    def __init__(self, name: str) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(sha256(name.encode()).digest())
        self.public = self._private.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        return self._private.sign(message)


def no_signature(_: bytes) -> bytes:
    """For what reads entries that were checked before: a rebuild looks at no signature."""
    return bytes(64)


@dataclass(frozen=True, slots=True)
class BenchDirectory:
    """Every node's member has the node's own id, and every head may charge everybody."""

    nodes: frozenset[bytes]

    def member_of_node(self, node: bytes) -> bytes | None:
        return node if node in self.nodes else None

    def is_member(self, account: bytes) -> bool:
        return account in self.nodes

    def may_issue(self, node: bytes) -> bool:
        return node in self.nodes

    def may_act_for(self, node: bytes, account: bytes) -> bool:
        return node == account

    def may_charge(self, node: bytes, hold: HoldOpened) -> bool:
        return hold.payer in self.nodes

    def rate_cards(self, version: int) -> Sequence[RateCard]:
        return (DEFAULT_RATE_CARD,) if version == DEFAULT_RATE_CARD.version else ()


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests to one head, by `payers` in turn, served by `stages` in turn. Each is two entries."""

    pod: bytes
    head: bytes
    sign: Sign
    payers: Sequence[bytes]
    stages: Sequence[tuple[bytes, Sign]]

    def entries(
        self, num_requests: int, index: int = 0, prev_hash: bytes = FIRST_PREV_HASH
    ) -> Iterator[Entry]:
        """After the entry before `index`, whose hash is `prev_hash`."""
        for number in range(num_requests):
            for body in self.bodies(number):
                time_ms = START_MS + INTERVAL_MS * index
                entry = sign_entry(self.pod, self.head, index, prev_hash, time_ms, body, self.sign)
                index, prev_hash = index + 1, entry.hash
                yield entry

    def bodies(self, number: int, at_ms: int | None = None) -> tuple[HoldOpened, HoldSettled]:
        session = b"bench" + self.head[:3] + number.to_bytes(8, "big")
        payer = self.payers[number % len(self.payers)]
        expires_at_ms = (START_MS + INTERVAL_MS * (2 * number + 8) if at_ms is None else at_ms) + 2_000_000
        hold = HoldOpened(session, payer, KEY_ID, MODEL, HELD_MICROCREDITS, expires_at_ms, 1)
        signed = self._receipt(session, payer, number)
        counts = (signed.receipt.num_prompt_tokens, 0, signed.receipt.num_output_tokens)
        return hold, HoldSettled(session, *counts, (signed,))

    def _receipt(self, session: bytes, payer: bytes, number: int) -> SignedReceipt:
        stage, sign = self.stages[number % len(self.stages)]
        receipt = Receipt(
            pod=self.pod,
            session=session,
            stage_index=0,
            head=self.head,
            payer=payer,
            key_id=KEY_ID,
            stage=stage,
            model=MODEL,
            start_layer=0,
            end_layer=30,
            num_parameters=NUM_PARAMETERS,
            rate_card_version=1,
            sequence=1,
            num_prompt_tokens=20 + number % 7,
            num_cached_tokens=0,
            num_output_tokens=30 + number % 5,
            amount_microcredits=0,
        )
        receipt = replace(receipt, amount_microcredits=expected_amount(receipt, DEFAULT_RATE_CARD))
        return co_sign(sign_as_head(receipt, self.sign), sign)
