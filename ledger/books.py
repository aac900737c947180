"""The books: a pure projection of entries to balances, holds, sessions and totals.

`apply` gives the same result for the same set of entries in any order; it neither checks entries
(`rules.py`) nor stores them (`journal.py`), and the caller applies each entry once.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ledger.directory import Directory
from ledger.dividends import PaidWork, Period
from ledger.entry import (
    ISSUANCE,
    TREASURY,
    AccountOpened,
    Disputed,
    Entry,
    HoldOpened,
    HoldSettled,
    HoldVoided,
    Issued,
    ReceiptClaimed,
    Transferred,
)
from ledger.key_use import KeyUse, KeyUses
from ledger.rate_card import RateCard
from ledger.receipt import Receipt, SignedReceipt, expected_amount
from ledger.session_record import Consumption, Hold, Payment, Resolution, SessionRecord, SessionState
from ledger.treasury import Changes, Treasury, TreasuryTotals

SessionKey = tuple[bytes, bytes]
MAX_CLOCK_SKEW_MS = 60 * 60 * 1000
# Above this many at once, sorting all is quicker than finding each one's place.
_MAX_NUM_INSERTED = 256
Payments = Mapping[tuple[int, bytes], Payment]


class UnknownPartyError(Exception):
    """An entry names a node or a rate card that the directory does not know."""


@dataclass(frozen=True, slots=True)
class Posting:
    """A change of one account; the postings of an entry sum to 0."""

    account: bytes
    amount_microcredits: int


@dataclass(frozen=True, slots=True)
class MemberTotals:
    """A member's work over all time. A token served by two stages is served by both."""

    num_prompt_tokens_consumed: int = 0
    num_cached_tokens_consumed: int = 0
    num_output_tokens_consumed: int = 0
    num_prompt_tokens_served: int = 0
    num_cached_tokens_served: int = 0
    num_output_tokens_served: int = 0
    microcredits_earned: int = 0
    microcredits_spent: int = 0
    microcredits_dividends: int = 0


@dataclass(frozen=True, slots=True)
class SettledStage:
    """One stage of a session as its counting receipt says."""

    stage_index: int
    node: bytes
    start_layer: int
    end_layer: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    amount_microcredits: int


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """One session for people: who paid, how it ended, what it cost, who served."""

    head: bytes
    session: bytes
    payer: bytes
    key_id: bytes
    model: bytes
    state: SessionState
    opened_ms: int | None
    closed_ms: int | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    amount_microcredits: int
    stages: tuple[SettledStage, ...]
    num_disputes: int


class Books:
    """The projection. Not safe for threads; `Ledger` guards it."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._balances: dict[bytes, int] = {TREASURY: 0, ISSUANCE: 0}
        self._treasury = Treasury()
        self._cards: dict[int, tuple[RateCard, ...]] = {}
        self._sessions: dict[SessionKey, SessionRecord] = {}
        self._unresolved: dict[bytes, dict[tuple[bytes, bytes, bytes], Hold]] = {}
        self._totals: defaultdict[bytes, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        # In order of time; those opened since somebody asked are put in their places when somebody does.
        self._recent: list[tuple[int, bytes, bytes]] = []
        self._undated: list[tuple[int, bytes, bytes]] = []
        self._keys = KeyUses()

    def apply(self, entry: Entry) -> tuple[Posting, ...]:
        """Take the entry in and return its postings. Raises UnknownPartyError and changes nothing then."""
        postings = _merge([*self._postings(entry), *self._date(entry)])
        assert sum(posting.amount_microcredits for posting in postings) == 0
        for posting in postings:
            self._balances[posting.account] = (
                self._balances.get(posting.account, 0) + posting.amount_microcredits
            )
        return postings

    def _postings(self, entry: Entry) -> list[Posting]:
        body = entry.body
        match body:
            case AccountOpened():
                return _postings(
                    self._treasury.open_account(body.member, self._cards_of(body.rate_card_version))
                )
            case Issued(amount_microcredits=amount):
                return _postings(self._treasury.issue(amount))
            case Transferred(from_account=source, to_account=target, amount_microcredits=amount):
                return _postings(self._treasury.transfer(source, target, amount))
            case HoldOpened():
                return self._open_hold(entry, body)
            case HoldSettled(receipts=receipts):
                self._check_parties(receipts)
                self._resolve(entry, body)
                return [posting for signed in receipts for posting in self._count(signed)]
            case HoldVoided():
                self._resolve(entry, body)
                return []
            case ReceiptClaimed(receipt=signed):
                self._check_parties((signed,))
                return self._count(signed)
            case Disputed(receipt=signed) if signed is not None:
                self._session(signed.receipt.head, body.session).num_disputes += 1
                return []
            case Disputed():
                return []

    def _date(self, entry: Entry) -> list[Posting]:
        member = self._directory.member_of_node(entry.author)
        return _postings(self._treasury.date(member, entry.time_ms)) if member is not None else []

    def _cards_of(self, version: int) -> tuple[RateCard, ...]:
        cards = self._cards.get(version) or tuple(self._directory.rate_cards(version))
        if not cards:
            raise UnknownPartyError(f"rate card {version} is not known")
        self._cards[version] = cards
        return cards

    def has_stale_cards(self) -> bool:
        """Whether a version used here has since been given a second content: then the books are made anew."""
        return any(
            tuple(self._directory.rate_cards(version)) != cards for version, cards in self._cards.items()
        )

    def _session(self, head: bytes, session: bytes) -> SessionRecord:
        return self._sessions.setdefault((head, session), SessionRecord(head, session))

    def _open_hold(self, entry: Entry, body: HoldOpened) -> list[Posting]:
        record = self._session(entry.author, body.session)
        if not record.holds:
            self._undated.append((entry.time_ms, entry.author, body.session))
        consumed, paid = record.consumption(), record.payments()
        known = record.holds.get((body.payer, body.key_id))
        record.add_hold(Hold.of(entry.author, body, entry.time_ms))
        self._open_key(record, known, record.holds[body.payer, body.key_id])
        self._count_consumption(consumed, record.consumption())
        if record.resolution is None:
            unresolved = self._unresolved.setdefault(body.payer, {})
            unresolved[entry.author, body.session, body.key_id] = record.holds[body.payer, body.key_id]
        return self._pay(paid, record.payments())

    def _resolve(self, entry: Entry, body: HoldSettled | HoldVoided) -> None:
        record = self._session(entry.author, body.session)
        before, resolved = record.consumption(), record.resolution
        record.resolve(Resolution(entry.index, entry.hash, entry.time_ms, body))
        before_ms = resolved.time_ms if resolved is not None else None
        for key in record.holds:
            self._settle_key(record, key, before_ms)
        self._count_consumption(before, record.consumption())
        for payer, key_id in record.holds:
            self._unresolved.get(payer, {}).pop((entry.author, body.session, key_id), None)

    def _open_key(self, record: SessionRecord, known: Hold | None, hold: Hold) -> None:
        key, before_ms = (hold.payer, hold.key_id), known.opened_ms if known is not None else None
        self._keys.open(key, record.head, record.session, before_ms, hold.opened_ms)
        if known is None:
            self._settle_key(record, key, None)

    def _settle_key(self, record: SessionRecord, key: tuple[bytes, bytes], before_ms: int | None) -> None:
        if record.resolution is not None:
            body, time_ms = record.resolution.body, record.resolution.time_ms
            num_tokens = 0
            if isinstance(body, HoldSettled):
                num_tokens = body.num_prompt_tokens + body.num_output_tokens
            self._keys.settle(key, record.head, record.session, before_ms, time_ms, num_tokens)

    def _check_parties(self, receipts: tuple[SignedReceipt, ...]) -> None:
        for signed in receipts:
            self._member_of(signed.receipt.head)
            self._member_of(signed.receipt.stage)
            self._card(signed.receipt)

    def _count(self, signed: SignedReceipt) -> list[Posting]:
        record = self._session(signed.receipt.head, signed.receipt.session)
        consumed, paid = record.consumption(), record.payments()
        record.count(signed)
        self._count_consumption(consumed, record.consumption())
        return self._pay(paid, record.payments())

    def _pay(self, before: Payments, after: Payments) -> list[Posting]:
        """Take back what is no longer paid, pay what is now."""
        postings: list[Posting] = []
        for place in {**before, **after}:
            old, new = before.get(place), after.get(place)
            if old == new:
                continue
            if old is not None:
                postings += self._payment_postings(old, -1)
            if new is not None:
                postings += self._payment_postings(new, 1)
        return postings

    def _payment_postings(self, payment: Payment, sign: int) -> list[Posting]:
        receipt, card = payment.receipt, self._card(payment.receipt)
        member = self._member_of(receipt.stage)
        amount = sign * payment.amount_microcredits
        levy = sign * card.levy(payment.amount_microcredits)
        self._add_totals(receipt.payer, microcredits_spent=amount)
        self._keys.pay((receipt.payer, receipt.key_id), amount)
        self._add_totals(
            member,
            num_prompt_tokens_served=sign * receipt.num_prompt_tokens,
            num_cached_tokens_served=sign * receipt.num_cached_tokens,
            num_output_tokens_served=sign * receipt.num_output_tokens,
            microcredits_earned=amount - levy,
        )
        self._treasury.levy(levy)
        return [
            Posting(receipt.payer, -amount),
            Posting(member, amount - levy),
            Posting(TREASURY, levy),
            *_postings(self._treasury.earn(member, amount - levy)),
            *self._dividend_postings(payment, card, sign),
        ]

    def _dividend_postings(self, payment: Payment, card: RateCard, sign: int) -> list[Posting]:
        receipt = payment.receipt
        if payment.opened_ms is None or receipt.num_prompt_tokens + receipt.num_output_tokens == 0:
            return []
        work = PaidWork(
            opened_ms=payment.opened_ms,
            period_s=card.dividend_period_s,
            head=self._member_of(receipt.head),
            payer=receipt.payer,
            server=self._member_of(receipt.stage),
            dividend_microcredits=card.dividend(card.levy(payment.amount_microcredits)),
        )
        return _postings(self._treasury.divide(work, sign))

    def _member_of(self, node: bytes) -> bytes:
        member = self._directory.member_of_node(node)
        if member is None:
            raise UnknownPartyError(f"node {node[:4].hex()} is not known")
        return member

    def _card(self, receipt: Receipt) -> RateCard:
        """Where several share a version (see `Directory`): the lowest levy of those with this price."""
        cards = self._cards_of(receipt.rate_card_version)
        if len(cards) == 1:
            return cards[0]
        fitting = [card for card in cards if expected_amount(receipt, card) == receipt.amount_microcredits]
        return min(fitting or cards, key=lambda card: (card.levy_per_mille, card.encode()))

    def _count_consumption(self, before: Consumption | None, after: Consumption | None) -> None:
        if before == after:
            return
        for consumption, sign in ((before, -1), (after, 1)):
            if consumption is not None:
                self._add_totals(
                    consumption.payer,
                    num_prompt_tokens_consumed=sign * consumption.num_prompt_tokens,
                    num_cached_tokens_consumed=sign * consumption.num_cached_tokens,
                    num_output_tokens_consumed=sign * consumption.num_output_tokens,
                )

    def _add_totals(self, member: bytes, **changes: int) -> None:
        totals = self._totals[member]
        for name, change in changes.items():
            totals[name] += change

    def balances(self) -> dict[bytes, int]:
        return dict(self._balances)

    def balance(self, account: bytes) -> int:
        return self._balances.get(account, 0)

    def available(self, account: bytes, now_ms: int) -> int:
        """Balance less open holds, in microcredits."""
        held = sum(hold.amount_microcredits for hold in self._open_holds_of(account, now_ms))
        return self.balance(account) - held

    def open_holds(self, now_ms: int) -> list[Hold]:
        return [hold for payer in self._unresolved for hold in self._open_holds_of(payer, now_ms)]

    def _open_holds_of(self, payer: bytes, now_ms: int) -> Iterator[Hold]:
        return (hold for hold in self._unresolved.get(payer, {}).values() if hold.expires_at_ms > now_ms)

    def holds_of(self, head: bytes, session: bytes) -> tuple[Hold, ...]:
        record = self._sessions.get((head, session))
        return tuple(record.holds.values()) if record is not None else ()

    def is_resolved(self, head: bytes, session: bytes) -> bool:
        record = self._sessions.get((head, session))
        return record is not None and record.resolution is not None

    def counts(self, receipt: Receipt) -> bool:
        """Whether this receipt is the one that counts for its stage."""
        record = self._sessions.get((receipt.head, receipt.session))
        return record is not None and record.counts(receipt)

    def is_paid(self, receipt: Receipt) -> bool:
        """Whether this receipt counts, or one that outranks it."""
        record = self._sessions.get((receipt.head, receipt.session))
        return record is not None and record.is_paid(receipt)

    def key_spent_microcredits(self, member: bytes, key_id: bytes) -> int:
        """What the member's API key has paid so far, at all gateways."""
        return self._keys.spent_microcredits((member, key_id))

    def num_key_sessions_since(self, member: bytes, key_id: bytes, since_ms: int) -> int:
        return len(self._keys.opened_since((member, key_id), since_ms))

    def key_use(
        self, member: bytes, key_id: bytes, now_ms: int, since_ms: int, head: bytes, known_from_ms: int
    ) -> KeyUse:
        """What the key has paid and holds at all gateways, and its sessions since then.

        Not those that `head` began or settled from `known_from_ms` on: those it counts itself.
        """
        key = (member, key_id)
        held = sum(
            hold.amount_microcredits for hold in self._open_holds_of(member, now_ms) if hold.key_id == key_id
        )
        opened = self._keys.opened_since(key, since_ms)
        settled = self._keys.settled_since(key, since_ms)
        return KeyUse(
            self._keys.spent_microcredits(key),
            held,
            tuple(at for at, by, _, _ in opened if by != head or at < known_from_ms),
            tuple((at, tokens) for at, by, _, tokens in settled if by != head or at < known_from_ms),
        )

    def is_account_open(self, member: bytes) -> bool:
        return self._treasury.is_open(member)

    def member_totals(self) -> dict[bytes, MemberTotals]:
        return {
            member: MemberTotals(
                **totals, microcredits_dividends=self._treasury.dividends_microcredits(member)
            )
            for member, totals in self._totals.items()
        }

    def treasury(self) -> TreasuryTotals:
        return self._treasury.totals()

    def dividend_periods(self) -> list[Period]:
        return self._treasury.periods()

    def transferable_microcredits(self, member: bytes) -> int:
        """How much more of this member's credit transfers can move, whatever its balance is."""
        return self._treasury.transferable_microcredits(member)

    def recent_sessions(self, limit: int, now_ms: int) -> list[SessionSummary]:
        """The sessions opened last, newest first; those a clock far ahead of ours dates come last."""
        self.sort_recent()
        num_dated = bisect_right(self._recent, (now_ms + MAX_CLOCK_SKEW_MS + 1,))
        places = itertools.chain(range(num_dated)[::-1], range(num_dated, len(self._recent))[::-1])
        newest = (self._recent[place] for place in itertools.islice(places, max(limit, 0)))
        found = (self.session(head, session, now_ms) for _, head, session in newest)
        return [summary for summary in found if summary is not None]

    def sort_recent(self) -> None:
        """What the next question about recent sessions needs; worth doing early after many entries."""
        if len(self._undated) > _MAX_NUM_INSERTED:
            self._recent += self._undated
            self._recent.sort()
        else:
            for place in self._undated:
                insort(self._recent, place)
        self._undated.clear()

    def session(self, head: bytes, session: bytes, now_ms: int) -> SessionSummary | None:
        record = self._sessions.get((head, session))
        if record is None or not (record.holds or record.receipts):
            return None
        return _summary(record, now_ms)


def _postings(changes: Changes) -> list[Posting]:
    return [Posting(account, change) for account, change in changes.items()]


def _merge(postings: list[Posting]) -> tuple[Posting, ...]:
    amounts: defaultdict[bytes, int] = defaultdict(int)
    for posting in postings:
        amounts[posting.account] += posting.amount_microcredits
    return tuple(Posting(account, amount) for account, amount in amounts.items())


def _summary(record: SessionRecord, now_ms: int) -> SessionSummary:
    hold = record.holds[min(record.holds)] if record.holds else None
    payments = [payment for _, payment in sorted(record.payments().items(), key=lambda item: item[0])]
    receipts = [payment.receipt for payment in payments]
    consumption = record.consumption()
    return SessionSummary(
        head=record.head,
        session=record.session,
        payer=hold.payer if hold is not None else receipts[0].payer,
        key_id=hold.key_id if hold is not None else receipts[0].key_id,
        model=hold.model if hold is not None else receipts[0].model,
        state=record.state(now_ms),
        opened_ms=hold.opened_ms if hold is not None else None,
        closed_ms=record.resolution.time_ms if record.resolution is not None else None,
        num_prompt_tokens=consumption.num_prompt_tokens if consumption is not None else 0,
        num_cached_tokens=consumption.num_cached_tokens if consumption is not None else 0,
        num_output_tokens=consumption.num_output_tokens if consumption is not None else 0,
        amount_microcredits=sum(payment.amount_microcredits for payment in payments),
        stages=tuple(_settled_stage(payment) for payment in payments),
        num_disputes=record.num_disputes,
    )


def _settled_stage(payment: Payment) -> SettledStage:
    receipt = payment.receipt
    return SettledStage(
        receipt.stage_index,
        receipt.stage,
        receipt.start_layer,
        receipt.end_layer,
        receipt.num_prompt_tokens,
        receipt.num_cached_tokens,
        receipt.num_output_tokens,
        payment.amount_microcredits,
    )
