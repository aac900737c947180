"""The attacks of docs/security.md that the ledger answers: each gains nothing, and would without its defence.

Every attack is a function that asserts what the attacker must not get. It runs twice: as it is, and with the
one defence it is about taken out of the code, and then it has to fail. So no test here passes for another
reason than it says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import ledger.books
import ledger.canonical
import ledger.chains
import ledger.dividends
import ledger.entry
import ledger.ingest
import ledger.ledger
import ledger.receipt
import ledger.rules
import ledger.session_record
import ledger.sync
import ledger.transfers
import ledger.treasury
from ledger import canonical, sync
from ledger.chains import MAX_NUM_BRANCHES, Chain, Place
from ledger.entry import (
    FIRST_PREV_HASH,
    MAX_ENTRY_BYTES,
    MAX_TIME_MS,
    TREASURY,
    AccountOpened,
    Body,
    Disputed,
    DisputeReason,
    Entry,
    EntryError,
    HoldVoided,
    Issued,
    ReceiptClaimed,
    Transferred,
    VoidReason,
    decode_entry,
    sign_entry,
)
from ledger.journal import JournalError
from ledger.ledger import LedgerError
from ledger.rate_card import DEFAULT_RATE_CARD
from ledger.receipt import Dispute, Receipt, WorkCount, check_against_count, co_sign
from ledger.session_record import Payment, SessionRecord, SessionState
from tests.ledger.world import KEY_SHOWN, POD, START_MS, Key, World, raws, session_id

OWNER, MALLORY, VICTIM = 0, 1, 2
GRANT = DEFAULT_RATE_CARD.starter_grant_microcredits
S = session_id(1)

Remove = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True, slots=True)
class Attack:
    name: str
    run: Callable[[], None]
    remove: Remove


ATTACKS: list[Attack] = []
ROOT = Path(__file__).parents[2]


def attack(remove: Remove) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register an attack with what takes its defence out."""

    def register(run: Callable[[], None]) -> Callable[[], None]:
        ATTACKS.append(Attack(run.__name__, run, remove))
        return run

    return register


def rule(reason: str) -> Remove:
    """Without the rule that refuses with this reason."""

    def remove(patch: pytest.MonkeyPatch) -> None:
        require = ledger.rules._require

        def lenient(is_fulfilled: bool, why: str) -> None:
            if why != reason:
                require(is_fulfilled, why)

        patch.setattr(ledger.rules, "_require", lenient)

    return remove


def replaced(target: object, name: str, new: object) -> Remove:
    return lambda patch: patch.setattr(target, name, new)


def all_of(*removes: Remove) -> Remove:
    def remove(patch: pytest.MonkeyPatch) -> None:
        for one in removes:
            one(patch)

    return remove


class Scene:
    """Owner, Mallory and a victim with a node each; `told` is the ledger of an honest node that hears all."""

    def __init__(self) -> None:
        self.world = World()
        self.told = self.world.ledger(OWNER)
        self._last: dict[bytes, Entry] = {}

    def signed(self, number: int, body: Body, **changes: Any) -> Entry:
        """The next entry of that node's journal, whether it breaks a rule or not."""
        node = self.world.nodes[number]
        last = self._last.get(node.public)
        fields: dict[str, Any] = {
            "pod": POD,
            "author": node.public,
            "index": last.index + 1 if last else 0,
            "prev_hash": last.hash if last else FIRST_PREV_HASH,
            "time_ms": START_MS,
        }
        return sign_entry(**(fields | changes), body=body, sign=node.sign)

    def say(self, number: int, body: Body, **changes: Any) -> Entry:
        """Write it into the journal and tell the honest node; it must take it."""
        entry = self.signed(number, body, **changes)
        result = self.told.ingest([entry.raw])
        assert result.num_new == 1, result.refused
        self._last[entry.author] = entry
        return entry

    def refused(self, number: int, body: Body, **changes: Any) -> None:
        """The honest node must not take this."""
        assert self.told.ingest([self.signed(number, body, **changes).raw]).num_new == 0

    def balance(self, number: int) -> int:
        return self.told.balance(self.world.members[number])

    def receipt(self, **changes: Any) -> Receipt:
        return self.world.receipt(S, **changes)

    def count_of(self, receipt: Receipt, last: Receipt | None = None) -> WorkCount:
        """The stage's own count: exactly what the receipt says."""
        names = [name for name in WorkCount.__slots__ if name not in ("rate_card", "last")]
        return WorkCount(
            **{name: getattr(receipt, name) for name in names}, rate_card=DEFAULT_RATE_CARD, last=last
        )


# Entries: who may say what


@attack(replaced(Entry, "is_signed_by_author", lambda entry: True))
def an_entry_signed_with_another_key() -> None:
    """Mallory writes a transfer in the victim's name."""
    scene = Scene()
    theft = Transferred(scene.world.members[VICTIM], scene.world.members[MALLORY], 5)
    scene.refused(MALLORY, theft, author=scene.world.nodes[VICTIM].public)


@attack(rule("its author is not a node of this pod"))
def a_stranger_writes() -> None:
    scene, stranger = Scene(), Key("stranger")
    body = Disputed(S, DisputeReason.TERMS)
    entry = sign_entry(POD, stranger.public, 0, FIRST_PREV_HASH, START_MS, body, stranger.sign)
    assert scene.told.ingest([entry.raw]).num_new == 0
    assert stranger.public not in scene.told.heads()


@attack(rule("it belongs to another pod"))
def an_entry_of_another_pod() -> None:
    """The owner of two pods issued credit in the one; Mallory shows it to the other."""
    Scene().refused(OWNER, Issued(10**9), pod=b"Q" * 32)


@attack(rule("a receipt belongs to another pod"))
def a_receipt_of_another_pod() -> None:
    scene = Scene()
    scene.say(VICTIM, scene.world.hold(S, payer=VICTIM))
    receipt = scene.receipt(head=VICTIM, stage=MALLORY, payer=VICTIM, pod=b"Q" * 32)
    scene.refused(MALLORY, ReceiptClaimed(scene.world.head_signed(receipt)))


@attack(rule("its author may not issue credit"))
def credit_out_of_nothing() -> None:
    Scene().refused(MALLORY, Issued(10**12))


@attack(rule("its author may not move credit out of this account"))
def a_transfer_out_of_another_account() -> None:
    scene = Scene()
    for source in (scene.world.members[VICTIM], TREASURY):
        scene.refused(MALLORY, Transferred(source, scene.world.members[MALLORY], 10**9))


@attack(
    all_of(
        replaced(ledger.canonical.FieldReader, "uint", lambda reader, key, maximum=0: reader._fields[key]),
        rule("the amount is not above zero"),
    )
)
def a_negative_transfer() -> None:
    """Giving minus five is taking five."""
    scene = Scene()
    theft = Transferred(scene.world.members[MALLORY], scene.world.members[VICTIM], -5)
    with pytest.raises(EntryError):
        scene.signed(MALLORY, theft)


@attack(replaced(ledger.transfers.Transfers, "_moved", lambda self, source: _sent_in_full(self, source)))
def giving_away_what_one_does_not_have() -> None:
    """Mallory's changed node writes a transfer without end to an accomplice."""
    scene = Scene()
    scene.say(MALLORY, AccountOpened(scene.world.members[MALLORY], 1))
    scene.say(MALLORY, Transferred(scene.world.members[MALLORY], scene.world.members[VICTIM], 10**15))
    assert scene.balance(VICTIM) <= GRANT + DEFAULT_RATE_CARD.credit_line_microcredits


def _sent_in_full(transfers: ledger.transfers.Transfers, source: bytes) -> dict[bytes, int]:
    changes: dict[bytes, int] = {}
    for target, amount in transfers._sent[source].items():
        changes[target] = changes.get(target, 0) + amount
        changes[source] = changes.get(source, 0) - amount
    return changes


def _granted_each_time(treasury: ledger.treasury.Treasury, member: bytes, cards: Any) -> dict[bytes, int]:
    grant = min(card.starter_grant_microcredits for card in cards)
    return {TREASURY: -grant, member: grant}


@attack(replaced(ledger.treasury.Treasury, "open_account", _granted_each_time))
def several_starter_grants() -> None:
    """Opened twice, with two cards, at any date, by two machines: one grant, the smallest named."""
    scene = Scene()
    mallory, generous = scene.world.members[MALLORY], replace(DEFAULT_RATE_CARD, version=2)
    scene.world.directory.cards[2] = replace(generous, starter_grant_microcredits=9 * GRANT)
    scene.world.directory.members[scene.world.nodes[VICTIM].public] = mallory
    scene.say(MALLORY, AccountOpened(mallory, 2))
    scene.say(MALLORY, AccountOpened(mallory, 1))
    scene.say(MALLORY, AccountOpened(mallory, 1, b"again"), time_ms=0)
    scene.say(VICTIM, AccountOpened(mallory, 1), time_ms=MAX_TIME_MS)
    assert scene.balance(MALLORY) == GRANT


@attack(rule("its author may not open this account"))
def accounts_that_nobody_has() -> None:
    """A starter grant for a member that never joined, to spend through an accomplice."""
    Scene().refused(MALLORY, AccountOpened(Key("nobody").public, 1))


# The journal: replays and forks


def _known_is_next(patch: pytest.MonkeyPatch) -> None:
    place = Chain.place

    def forgetful(chain: Chain, *where: Any) -> Place:
        found = place(chain, *where)
        return Place.BRANCH if found is Place.KNOWN else found

    patch.setattr(Chain, "place", forgetful)


@attack(_known_is_next)
def replayed_entries() -> None:
    scene = Scene()
    entries = [scene.say(OWNER, Issued(7)), scene.say(OWNER, Issued(8))]
    before = scene.told.balances(), scene.told.digest()
    for _ in range(2):
        assert scene.told.ingest([entry.raw for entry in reversed(entries)]).num_new == 0
    assert (scene.told.balances(), scene.told.digest()) == before


def _first_branch_only(patch: pytest.MonkeyPatch) -> None:
    place = Chain.place

    def deaf(chain: Chain, *where: Any) -> Place:
        found = place(chain, *where)
        return Place.GAP if found is Place.BRANCH else found

    patch.setattr(Chain, "place", deaf)


@attack(_first_branch_only)
def a_fork_that_takes_a_payment_back() -> None:
    """Mallory settles with the victim, then shows the others a journal where the hold was voided."""
    scene, reader = Scene(), World().ledger(VICTIM)
    hold = scene.say(MALLORY, scene.world.hold(S, payer=MALLORY))
    receipt = scene.receipt(head=MALLORY, payer=MALLORY, stage=VICTIM)
    void = scene.signed(MALLORY, HoldVoided(S, VoidReason.FAILED))
    settled = scene.say(MALLORY, scene.world.settlement(S, receipt))
    reader.ingest([hold.raw, void.raw])
    for one, other in ((reader, scene.told), (scene.told, reader)):
        one.ingest(raws(other))
    assert reader.digest() == scene.told.digest()
    assert reader.balances() == scene.told.balances()
    assert scene.balance(VICTIM) == receipt.amount_microcredits - DEFAULT_RATE_CARD.levy(
        receipt.amount_microcredits
    )
    third_party = World().ledger(VICTIM)
    proof = third_party.ingest([hold.raw, void.raw, settled.raw])
    assert [(fork.author, fork.index) for fork in proof.forks] == [(scene.world.nodes[MALLORY].public, 1)]


@attack(replaced(Chain, "is_forked", False))
def a_forked_author_goes_on() -> None:
    """The proof is two entries that anybody can check; who holds them knows and names the author."""
    world, author = World(), World().nodes[MALLORY]
    twins = [
        sign_entry(
            POD,
            author.public,
            0,
            FIRST_PREV_HASH,
            START_MS + number,
            Disputed(S, DisputeReason.TERMS),
            author.sign,
        )
        for number in range(2)
    ]
    third_party, own = world.ledger(OWNER), world.ledger(MALLORY)
    for reader in (third_party, own):
        reader.ingest([twin.raw for twin in twins])
        assert reader.is_frozen(author.public)
        assert reader.frozen_authors() == frozenset({author.public})
        assert [str(violation) for violation in reader.verify()] == [
            f"entry 0 of {author.public.hex()[:8]}: fork: 2 entries with this index"
        ]
    with pytest.raises(LedgerError, match="forked"):
        own.append(Disputed(S, DisputeReason.TERMS))


@attack(all_of(replaced(ledger.chains, "MAX_NUM_BRANCHES", 10_000)))
def branches_without_end() -> None:
    """One author cannot fill the others' disks with first entries."""
    scene = Scene()
    rivals = [
        scene.signed(MALLORY, Disputed(S, DisputeReason.TERMS), time_ms=START_MS + n) for n in range(40)
    ]
    assert scene.told.ingest([rival.raw for rival in rivals]).num_new == MAX_NUM_BRANCHES


@attack(
    replaced(ledger.sync, "_in_turns", lambda sources: (record for source in sources for record in source))
)
def entries_that_keep_others_back() -> None:
    """Mallory's journal, of which a reader refuses everything, does not stop what honest authors wrote."""
    scene, behind = Scene(), World()
    stranger = min((Key(f"stranger {number}") for number in range(20)), key=lambda key: key.public)
    assert all(stranger.public < node.public for node in scene.world.nodes)
    scene.world.directory.members[stranger.public] = scene.world.members[MALLORY]
    last: Entry | None = None
    for index in range(30):
        prev_hash = last.hash if last else FIRST_PREV_HASH
        body = Disputed(S, DisputeReason.TERMS)
        last = sign_entry(POD, stranger.public, index, prev_hash, START_MS, body, stranger.sign)
        scene.told.ingest([last.raw])
    honest = scene.say(OWNER, Issued(5))
    reader = behind.ledger(VICTIM)
    reader.ingest(scene.told.missing(reader.heads(), 2_000)[0])
    assert honest.author in reader.heads()


# Sizes


@attack(replaced(ledger.canonical, "decode", lambda raw, *_, **__: _decode_any_size(raw)))
def oversized_records() -> None:
    """Bytes are counted before they are parsed."""
    parsed: list[int] = []
    with _counted_parsing(parsed):
        for refuse in (
            lambda: decode_entry(b"\xa8" + b"\x00" * MAX_ENTRY_BYTES),
            lambda: sync.decode_batch(b"\xa2" + b"\x00" * 5_000_000),
            lambda: sync.decode_heads(b"\xa2" + b"\x00" * 5_000_000),
        ):
            with suppress(ValueError):
                refuse()
    assert parsed == []


@contextmanager
def _counted_parsing(parsed: list[int]) -> Iterator[None]:
    loads = canonical.cbor2.loads

    def counting(raw: bytes, **options: Any) -> Any:
        parsed.append(len(raw))
        return loads(raw, **options)

    canonical.cbor2.loads = counting
    try:
        yield
    finally:
        canonical.cbor2.loads = loads


def _decode_any_size(raw: bytes) -> canonical.FieldReader:
    return canonical.FieldReader(canonical.cbor2.loads(raw))


@attack(replaced(ledger.canonical.FieldReader, "raw_up_to", lambda reader, key, _: reader._fields[key]))
def oversized_fields() -> None:
    """Within an entry each field has its own limit."""
    scene = Scene()
    for body in (
        Issued(5, b"x" * 65),
        AccountOpened(scene.world.members[OWNER], 1, b"x" * 20_000),
        replace(scene.world.hold(S), authorization=b"x" * 1_025),
    ):
        with pytest.raises(EntryError):
            scene.signed(OWNER, body)


# Holds


@attack(rule("its author may not charge this payer"))
def a_hold_on_another_account() -> None:
    """Without the victim's key. That another hold's proof is of no use: test_roster_directory.py."""
    scene = Scene()
    scene.refused(MALLORY, scene.world.hold(S, payer=VICTIM))
    scene.refused(MALLORY, replace(scene.world.hold(S, payer=VICTIM), authorization=b"made up"))


@attack(rule("its author opened no such hold"))
def ending_another_heads_hold() -> None:
    """Mallory settles or voids the session of the victim's gateway."""
    scene = Scene()
    scene.say(VICTIM, scene.world.hold(S, payer=VICTIM))
    scene.refused(MALLORY, HoldVoided(S, VoidReason.CANCELLED))
    assert [hold.session for hold in scene.told.open_holds()] == [S]


@attack(
    all_of(rule("a receipt's payer or key is not the hold's"), rule("its receipts would exceed the hold"))
)
def head_and_stage_charge_a_third_member() -> None:
    """Mallory is head and stage, signs as both, and names the victim as payer."""
    scene = Scene()
    scene.say(MALLORY, scene.world.hold(S, payer=MALLORY))
    scene.refused(
        MALLORY, scene.world.settlement(S, scene.receipt(head=MALLORY, stage=MALLORY, payer=VICTIM))
    )


@attack(
    all_of(
        rule("its receipts would exceed the hold"),
        replaced(
            SessionRecord,
            "payments",
            lambda record: {
                place: Payment(signed.receipt, signed.receipt.amount_microcredits, START_MS)
                for place, signed in record.receipts.items()
            },
        ),
    )
)
def more_than_the_hold() -> None:
    """A gateway that was shown a key for one hold charges more; at once, and claim by claim."""
    scene = Scene()
    hold = replace(scene.world.hold(S, payer=VICTIM), authorization=KEY_SHOWN)
    scene.say(MALLORY, replace(hold, amount_microcredits=2_000_000))
    receipts = [
        scene.receipt(head=MALLORY, stage=stage, payer=VICTIM, stage_index=stage)
        for stage in (OWNER, MALLORY)
    ]
    assert sum(receipt.amount_microcredits for receipt in receipts) > 2_000_000
    scene.told.ingest([scene.signed(MALLORY, scene.world.settlement(S, *receipts)).raw])
    for receipt in receipts:
        stage = next(n for n in (OWNER, MALLORY) if scene.world.nodes[n].public == receipt.stage)
        scene.told.ingest([scene.signed(stage, ReceiptClaimed(scene.world.head_signed(receipt))).raw])
    assert scene.balance(VICTIM) >= -2_000_000


def _last_word_counts(record: SessionRecord, resolution: Any) -> None:
    record.resolution = resolution


@attack(replaced(SessionRecord, "resolve", _last_word_counts))
def a_hold_resolved_twice() -> None:
    """Settled, then voided by a changed node: the first counts everywhere, verify names the second."""
    scene = Scene()
    scene.say(MALLORY, scene.world.hold(S, payer=MALLORY))
    scene.say(MALLORY, scene.world.settlement(S, scene.receipt(head=MALLORY, payer=MALLORY, stage=VICTIM)))
    scene.say(MALLORY, HoldVoided(S, VoidReason.CANCELLED))
    summary = scene.told.session(scene.world.nodes[MALLORY].public, S)
    assert summary is not None
    assert (summary.state, scene.balance(VICTIM) > 0) == (SessionState.SETTLED, True)
    name = scene.world.nodes[MALLORY].public.hex()[:8]
    assert [str(violation) for violation in scene.told.verify()] == [
        f"entry 2 of {name}: its hold was already resolved by entry 1"
    ]


# Receipts


@attack(rule("a receipt's amount is not the price of its counts"))
def a_wrong_sum() -> None:
    """A million tokens' price for thirty tokens, agreed between head and stage on a key's account."""
    scene = Scene()
    scene.say(MALLORY, replace(scene.world.hold(S, payer=VICTIM), authorization=KEY_SHOWN))
    receipt = scene.receipt(head=MALLORY, stage=MALLORY, payer=VICTIM, amount_microcredits=9_999_999)
    scene.refused(MALLORY, scene.world.settlement(S, receipt))


@attack(replaced(ledger.rules, "verify_head", lambda signed: None))
def a_stage_that_lies_about_served_tokens() -> None:
    """It raises the counts of a receipt that its head did sign."""
    scene = Scene()
    scene.say(VICTIM, scene.world.hold(S, payer=VICTIM))
    genuine = scene.world.head_signed(scene.receipt(head=VICTIM, payer=VICTIM, stage=MALLORY))
    more = scene.receipt(head=VICTIM, payer=VICTIM, stage=MALLORY, num_output_tokens=100, sequence=2)
    scene.refused(
        MALLORY, ReceiptClaimed(co_sign(replace(genuine, receipt=more), scene.world.nodes[MALLORY].sign))
    )
    assert scene.balance(VICTIM) == 0


@attack(replaced(ledger.rules, "verify_stage", lambda signed: None))
def a_head_that_settles_for_less() -> None:
    """It puts a receipt into the settlement that its stage never agreed to."""
    scene = Scene()
    scene.say(MALLORY, scene.world.hold(S, payer=MALLORY))
    less = scene.receipt(head=MALLORY, payer=MALLORY, stage=VICTIM, num_output_tokens=1)
    forged = co_sign(scene.world.head_signed(less), scene.world.nodes[MALLORY].sign)
    scene.refused(MALLORY, replace(scene.world.settlement(S), receipts=(forged,)))


@attack(replaced(ledger.session_record, "receipt_rank", lambda receipt: (-receipt.sequence,)))
def a_head_that_settles_an_old_receipt() -> None:
    """The stage claims the newer one; the higher sequence counts, whichever comes first."""
    scene = Scene()
    old, new = (
        scene.receipt(head=MALLORY, payer=MALLORY, stage=VICTIM, num_output_tokens=tokens, sequence=sequence)
        for tokens, sequence in ((1, 1), (20, 2))
    )
    scene.say(MALLORY, scene.world.hold(S, payer=MALLORY))
    scene.say(MALLORY, scene.world.settlement(S, old))
    scene.say(VICTIM, ReceiptClaimed(scene.world.head_signed(new)))
    assert scene.balance(MALLORY) == -new.amount_microcredits
    assert scene.told.counts(new)


def _paid_each_time(record: SessionRecord, signed: Any) -> None:
    record.receipts[signed.receipt.stage_index + 1_000 * len(record.receipts), signed.receipt.stage] = signed


@attack(replaced(SessionRecord, "count", _paid_each_time))
def a_replayed_receipt() -> None:
    """Settled, and claimed again and again by the stage."""
    scene = Scene()
    receipt = scene.receipt(head=VICTIM, payer=VICTIM, stage=MALLORY)
    scene.say(VICTIM, scene.world.hold(S, payer=VICTIM))
    scene.say(VICTIM, scene.world.settlement(S, receipt))
    for _ in range(3):
        scene.say(MALLORY, ReceiptClaimed(scene.world.co_signed(receipt)))
    assert scene.balance(VICTIM) == -receipt.amount_microcredits


@attack(rule("a receipt is another session's"))
def a_receipt_used_for_another_session() -> None:
    scene, other = Scene(), session_id(2)
    for session in (S, other):
        scene.say(MALLORY, replace(scene.world.hold(session, payer=VICTIM), authorization=KEY_SHOWN))
    receipt = scene.receipt(head=MALLORY, payer=VICTIM, stage=MALLORY)
    scene.refused(MALLORY, scene.world.settlement(other, receipt))


@attack(rule("the claimed receipt is another stage's"))
def claiming_for_another_stage() -> None:
    """A head's signature is not its stage's word: only the stage may claim without a co-signature."""
    scene = Scene()
    scene.say(MALLORY, replace(scene.world.hold(S, payer=VICTIM), authorization=KEY_SHOWN))
    never_served = scene.receipt(head=MALLORY, payer=VICTIM, stage=OWNER, num_output_tokens=100)
    scene.refused(MALLORY, ReceiptClaimed(scene.world.head_signed(never_served)))


@attack(all_of(rule("its head opened no such hold"), rule("its receipt would exceed the hold")))
def a_claim_without_a_hold() -> None:
    """Mallory's own node signs as head for the victim's account, and claims as stage."""
    scene = Scene()
    receipt = scene.receipt(head=MALLORY, payer=VICTIM, stage=MALLORY)
    scene.refused(MALLORY, ReceiptClaimed(scene.world.head_signed(receipt)))


def _voided_pays_nothing(patch: pytest.MonkeyPatch) -> None:
    payments = SessionRecord.payments

    def unless_voided(record: SessionRecord) -> dict[tuple[int, bytes], Payment]:
        is_voided = record.resolution is not None and isinstance(record.resolution.body, HoldVoided)
        return {} if is_voided else payments(record)

    patch.setattr(SessionRecord, "payments", unless_voided)


@attack(_voided_pays_nothing)
def a_head_that_voids_what_it_signed_for() -> None:
    """Otherwise every session would be free: take the tokens, sign as asked, then say that it failed."""
    scene = Scene()
    receipt = scene.receipt(head=MALLORY, payer=MALLORY, stage=VICTIM)
    scene.say(MALLORY, scene.world.hold(S, payer=MALLORY))
    scene.say(MALLORY, HoldVoided(S, VoidReason.FAILED))
    scene.say(VICTIM, ReceiptClaimed(scene.world.head_signed(receipt)))
    assert scene.balance(VICTIM) > 0


def _one_receipt_per_place(record: SessionRecord, signed: Any) -> None:
    for place in list(record.receipts):
        if place[0] == signed.receipt.stage_index:
            del record.receipts[place]
    record.receipts[signed.receipt.stage_index, signed.receipt.stage] = signed


@attack(replaced(SessionRecord, "count", _one_receipt_per_place))
def a_head_that_names_another_node_in_a_stages_place() -> None:
    """A receipt for an accomplice at the same place in the route does not void the stage's pay."""
    scene = Scene()
    scene.say(MALLORY, scene.world.hold(S, payer=MALLORY))
    served = scene.receipt(head=MALLORY, payer=MALLORY, stage=VICTIM)
    scene.say(VICTIM, ReceiptClaimed(scene.world.head_signed(served)))
    mine = scene.receipt(head=MALLORY, payer=MALLORY, stage=MALLORY, sequence=9)
    scene.say(MALLORY, ReceiptClaimed(scene.world.head_signed(mine)))
    assert scene.balance(VICTIM) > 0


def _co_sign_blindly(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "check_against_count", lambda receipt, own: None)


@attack(_co_sign_blindly)
def a_head_that_under_reports() -> None:
    """The stage signs no count that falls, no price that is not the counts', no prompt that is cut short."""
    scene = Scene()
    receipt = scene.receipt(sequence=2)
    own = scene.count_of(receipt, last=scene.receipt(sequence=1, num_output_tokens=15))
    check_against_count(receipt, own)
    for cheated in (
        scene.receipt(sequence=2, num_output_tokens=14),
        scene.receipt(sequence=2, num_prompt_tokens=1),
        scene.receipt(sequence=2, amount_microcredits=1),
        scene.receipt(sequence=2, num_parameters=1),
        scene.receipt(sequence=1),
    ):
        with pytest.raises(Dispute):
            check_against_count(cheated, own)


# Time


@attack(rule("the hold expires before it opens"))
def a_hold_that_was_over_before_it_began() -> None:
    scene = Scene()
    scene.refused(
        MALLORY, replace(scene.world.hold(S, payer=MALLORY), expires_at_ms=START_MS), time_ms=START_MS
    )


@attack(replaced(ledger.books, "MAX_CLOCK_SKEW_MS", MAX_TIME_MS))
def sessions_of_the_far_future() -> None:
    """They do not push everybody else's out of the list of recent ones for ever."""
    scene = Scene()
    hold = replace(scene.world.hold(S, payer=MALLORY), expires_at_ms=MAX_TIME_MS)
    scene.say(MALLORY, hold, time_ms=MAX_TIME_MS - 1)
    scene.say(VICTIM, scene.world.hold(session_id(2), payer=VICTIM))
    assert [summary.session for summary in scene.told.recent_sessions(1)] == [session_id(2)]


@attack(replaced(ledger.entry, "MAX_TIME_MS", 2**62))
def dates_that_cannot_be_shown() -> None:
    """No entry has a date that would break the pages of whoever shows it."""
    with pytest.raises(EntryError):
        Scene().signed(OWNER, Issued(5), time_ms=MAX_TIME_MS + 1)


@attack(replaced(SessionRecord, "resolve", lambda record, new: _earliest_date_counts(record, new)))
def an_ending_with_an_earlier_date() -> None:
    """What ended a session is the first in the journal, whatever the entries are dated."""
    scene = Scene()
    scene.say(MALLORY, scene.world.hold(S, payer=MALLORY))
    scene.say(MALLORY, scene.world.settlement(S, scene.receipt(head=MALLORY, payer=MALLORY, stage=VICTIM)))
    scene.say(MALLORY, HoldVoided(S, VoidReason.FAILED), time_ms=0)
    summary = scene.told.session(scene.world.nodes[MALLORY].public, S)
    assert summary is not None
    assert summary.state is SessionState.SETTLED


def _earliest_date_counts(record: SessionRecord, new: Any) -> None:
    if record.resolution is None or new.time_ms < record.resolution.time_ms:
        record.resolution = new


@attack(replaced(ledger.dividends._Pool, "is_closed", property(lambda pool: pool.num_heads_past > 0)))
def a_period_closed_by_one_clock() -> None:
    """Mallory dates an entry far ahead to have a period divided before the others had their part in it."""
    scene = Scene()
    for number in (OWNER, MALLORY, VICTIM):
        session = session_id(number)
        receipt = scene.world.receipt(session, head=number, payer=number, stage=(number + 1) % 3)
        scene.say(number, scene.world.hold(session, payer=number))
        scene.say(number, scene.world.settlement(session, receipt))
    before = scene.told.balances()
    scene.say(MALLORY, Disputed(S, DisputeReason.TERMS), time_ms=MAX_TIME_MS)
    assert scene.told.balances() == before
    assert [period.is_paid for period in scene.told.dividend_periods()] == [False]


# The tests


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_gains_nothing(attack: Attack) -> None:
    attack.run()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_succeeds_without_its_defence(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would say nothing about the defence."""
    attack.remove(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception, JournalError)):
        attack.run()


def test_the_document_names_each_attack_and_no_test_that_is_not_there() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    quoted = re.findall(r"`([^`\n]+)`", text)
    assert {attack.name for attack in ATTACKS} - set(quoted) == set()
    source = ""
    for name in quoted:
        path, _, test = name.partition("::")
        if path.rpartition("/")[2].startswith("test_") and path.endswith(".py"):
            found = [ROOT / path] if "/" in path else list((ROOT / "tests").rglob(path))
            assert found, name
            source = "".join(file.read_text() for file in found)
        if test:
            assert f"def {test}(" in source, name
