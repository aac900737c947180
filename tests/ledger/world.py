"""A small pod for ledger tests: deterministic keys, a directory in memory, a clock that is told the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ledger.entry import TREASURY, HoldOpened, HoldSettled
from ledger.ledger import MEMORY_URL, Ledger
from ledger.rate_card import DEFAULT_RATE_CARD, RateCard
from ledger.receipt import Receipt, SignedReceipt, co_sign, expected_amount, sign_as_head

POD = b"P" * 32
MODEL = b"M" * 32
KEY = b"K" * 16
START_MS = 1_800_000_000_000
NUM_PARAMETERS = 45_000_000
KEY_SHOWN = b"made with the payer's key"


class Key:
    def __init__(self, name: str) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(sha256(name.encode()).digest())
        self.public = self._private.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        return self._private.sign(message)


@dataclass
class FakeDirectory:
    members: dict[bytes, bytes] = field(default_factory=dict)
    admins: set[bytes] = field(default_factory=set)
    cards: dict[int, RateCard] = field(default_factory=lambda: {1: DEFAULT_RATE_CARD})

    def member_of_node(self, node: bytes) -> bytes | None:
        return self.members.get(node)

    def is_member(self, account: bytes) -> bool:
        return account in self.members.values()

    def may_issue(self, node: bytes) -> bool:
        return node in self.admins

    def may_act_for(self, node: bytes, account: bytes) -> bool:
        return self.members.get(node) == account or (account == TREASURY and node in self.admins)

    def may_charge(self, node: bytes, hold: HoldOpened) -> bool:
        return hold.authorization == KEY_SHOWN

    def rate_cards(self, version: int) -> tuple[RateCard, ...]:
        return (self.cards[version],) if version in self.cards else ()


@dataclass
class Clock:
    now_ms: int = START_MS

    def __call__(self) -> int:
        return self.now_ms


class World:
    """Three members with a node each; the first is the admin."""

    def __init__(self) -> None:
        self.nodes = [Key(f"node {number}") for number in range(3)]
        self.members = [Key(f"member {number}").public for number in range(3)]
        self.directory = FakeDirectory(
            members={node.public: member for node, member in zip(self.nodes, self.members, strict=True)},
            admins={self.nodes[0].public},
        )
        self.clock = Clock()

    def ledger(
        self, number: int = 0, url: str = MEMORY_URL, sign: Callable[[bytes], bytes] | None = None
    ) -> Ledger:
        node = self.nodes[number]
        return Ledger.open(url, POD, self.directory, node.public, sign or node.sign, self.clock)

    def receipt(
        self,
        session: bytes,
        head: int = 0,
        stage: int = 1,
        payer: int = 0,
        stage_index: int = 0,
        sequence: int = 1,
        num_prompt_tokens: int = 10,
        num_cached_tokens: int = 0,
        num_output_tokens: int = 20,
        num_parameters: int = NUM_PARAMETERS,
        rate_card_version: int = 1,
        amount_microcredits: int | None = None,
        pod: bytes = POD,
    ) -> Receipt:
        receipt = Receipt(
            pod=pod,
            session=session,
            stage_index=stage_index,
            head=self.nodes[head].public,
            payer=self.members[payer],
            key_id=KEY,
            stage=self.nodes[stage].public,
            model=MODEL,
            start_layer=stage_index * 10,
            end_layer=stage_index * 10 + 10,
            num_parameters=num_parameters,
            rate_card_version=rate_card_version,
            sequence=sequence,
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=num_cached_tokens,
            num_output_tokens=num_output_tokens,
            amount_microcredits=0,
        )
        if amount_microcredits is None:
            amount_microcredits = expected_amount(receipt, self.directory.cards[rate_card_version])
        return Receipt(
            **{name: getattr(receipt, name) for name in Receipt.__slots__ if name != "amount_microcredits"},
            amount_microcredits=amount_microcredits,
        )

    def head_signed(self, receipt: Receipt) -> SignedReceipt:
        return sign_as_head(receipt, self._key_of(receipt.head).sign)

    def co_signed(self, receipt: Receipt) -> SignedReceipt:
        return co_sign(self.head_signed(receipt), self._key_of(receipt.stage).sign)

    def _key_of(self, public: bytes) -> Key:
        return next(node for node in self.nodes if node.public == public)

    def hold(
        self,
        session: bytes,
        payer: int = 0,
        amount_microcredits: int = 10_000_000,
        head: int | None = None,
    ) -> HoldOpened:
        """`head` is whose node opens it; the payer's own if it is not named."""
        return HoldOpened(
            session=session,
            payer=self.members[payer],
            key_id=KEY,
            model=MODEL,
            amount_microcredits=amount_microcredits,
            expires_at_ms=self.clock.now_ms + 60_000,
            rate_card_version=1,
            authorization=b"" if head in (None, payer) else KEY_SHOWN,
        )

    def settlement(self, session: bytes, *receipts: Receipt) -> HoldSettled:
        return HoldSettled(
            session=session,
            num_prompt_tokens=max((receipt.num_prompt_tokens for receipt in receipts), default=0),
            num_cached_tokens=max((receipt.num_cached_tokens for receipt in receipts), default=0),
            num_output_tokens=max((receipt.num_output_tokens for receipt in receipts), default=0),
            receipts=tuple(self.co_signed(receipt) for receipt in receipts),
        )


def session_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def raws(ledger: Ledger) -> list[bytes]:
    found, has_more = ledger.missing({}, 1 << 30)
    assert not has_more
    return found
