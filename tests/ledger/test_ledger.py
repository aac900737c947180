"""The ledger of one node: what it writes, what it takes in, and every rule that refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ledger.entry import (
    FIRST_PREV_HASH,
    TREASURY,
    AccountOpened,
    Body,
    Disputed,
    DisputeReason,
    HoldVoided,
    Issued,
    ReceiptClaimed,
    Transferred,
    VoidReason,
    sign_entry,
)
from ledger.journal import JournalError, Record
from ledger.ledger import Ledger, LedgerError
from ledger.receipt import Receipt, SignedReceipt, co_sign
from ledger.store.sql_journal import SqlJournal
from tests.ledger.world import KEY, POD, START_MS, Key, World, raws, session_id


@pytest.fixture
def world() -> World:
    return World()


def test_entries_are_numbered_chained_and_dated(world: World) -> None:
    ledger = world.ledger()
    first = ledger.append(Issued(5))
    world.clock.now_ms += 7
    second = ledger.append(Issued(6))
    assert (first.index, first.prev_hash, first.time_ms) == (0, FIRST_PREV_HASH, START_MS)
    assert (second.index, second.prev_hash, second.time_ms) == (1, first.hash, START_MS + 7)
    assert ledger.num_entries() == 2
    assert ledger.verify() == []


def test_a_key_used_at_somebody_elses_gateway(world: World) -> None:
    ledger = world.ledger(0)
    receipt = world.receipt(session_id(1), payer=2, stage=1)
    ledger.append(world.hold(session_id(1), payer=2, head=0))
    ledger.append(world.settlement(session_id(1), receipt))
    assert ledger.balance(world.members[2]) == -receipt.amount_microcredits
    assert sum(ledger.balances().values()) == 0


@pytest.mark.parametrize("first", ["settle", "void"])
@pytest.mark.parametrize("second", ["settle", "void"])
def test_a_hold_is_resolved_at_most_once(world: World, first: str, second: str) -> None:
    ledger = world.ledger()
    ledger.append(world.hold(session_id(1)))
    bodies: dict[str, Body] = {
        "settle": world.settlement(session_id(1), world.receipt(session_id(1))),
        "void": HoldVoided(session_id(1), VoidReason.FAILED),
    }
    ledger.append(bodies[first])
    balances = ledger.balances()
    with pytest.raises(LedgerError, match="resolved already"):
        ledger.append(bodies[second])
    assert (ledger.balances(), ledger.num_entries()) == (balances, 2)


def test_a_session_has_one_hold(world: World) -> None:
    ledger = world.ledger()
    ledger.append(world.hold(session_id(1)))
    with pytest.raises(LedgerError, match="has a hold already"):
        ledger.append(world.hold(session_id(1)))


Refused = Callable[[World], Body]


def bad_settlement(**changes: int) -> Refused:
    return lambda world: world.settlement(session_id(1), world.receipt(session_id(1), **changes))


def unsigned_by_stage(world: World) -> Body:
    body = world.settlement(session_id(1))
    return replace(body, receipts=(world.head_signed(world.receipt(session_id(1))),))


def signed_by_another_stage(world: World) -> Body:
    signed = co_sign(world.head_signed(world.receipt(session_id(1))), world.nodes[2].sign)
    return replace(world.settlement(session_id(1)), receipts=(signed,))


def signed_by_another_head(world: World) -> Body:
    signed = world.co_signed(world.receipt(session_id(1)))
    forged = replace(signed, head_signature=world.nodes[1].sign(b"other"))
    return replace(world.settlement(session_id(1)), receipts=(forged,))


def receipt_of_another_pod(world: World) -> Body:
    return world.settlement(session_id(1), world.receipt(session_id(1), pod=b"Q" * 32))


def receipt_of_another_session(world: World) -> Body:
    return world.settlement(session_id(1), world.receipt(session_id(2)))


def receipt_of_a_stranger(world: World) -> Body:
    stranger = Key("stranger")
    receipt = replace(world.receipt(session_id(1)), stage=stranger.public)
    signed = co_sign(world.head_signed(receipt), stranger.sign)
    return replace(world.settlement(session_id(1)), receipts=(signed,))


def two_receipts_above_the_hold(world: World) -> Body:
    """Each is within the hold of 10 credits, both together are not."""
    receipts = [
        world.receipt(session_id(1), stage=stage, stage_index=stage, num_output_tokens=120)
        for stage in (0, 1)
    ]
    assert all(receipt.amount_microcredits <= 10_000_000 for receipt in receipts)
    return world.settlement(session_id(1), *receipts)


def dear_receipt(world: World) -> Receipt:
    receipt = world.receipt(session_id(1), num_output_tokens=1_000)
    assert receipt.amount_microcredits > 10_000_000
    return receipt


def unheld_receipt(world: World, session: int = 1, payer: int = 0, key_id: bytes = KEY) -> SignedReceipt:
    return world.head_signed(replace(world.receipt(session_id(session), payer=payer), key_id=key_id))


RULES: list[tuple[str, int, Refused]] = [
    ("amount is not the price", 0, bad_settlement(amount_microcredits=1)),
    ("another head's", 0, bad_settlement(head=1)),
    ("payer or key is not the hold's", 0, bad_settlement(payer=1)),
    ("another session's", 0, receipt_of_another_session),
    ("another pod", 0, receipt_of_another_pod),
    ("stage's signature", 0, unsigned_by_stage),
    ("stage's signature", 0, signed_by_another_stage),
    ("head's signature", 0, signed_by_another_head),
    ("stage is not of this pod", 0, receipt_of_a_stranger),
    ("opened no such hold", 1, lambda world: replace(world.settlement(session_id(1)), receipts=())),
    ("opened no such hold", 1, lambda world: HoldVoided(session_id(1), VoidReason.FAILED)),
    ("more cached", 0, lambda world: replace(world.settlement(session_id(1)), num_cached_tokens=5)),
    ("expires before", 0, lambda world: replace(world.hold(session_id(2)), expires_at_ms=START_MS)),
    ("rate card 9", 0, lambda world: replace(world.hold(session_id(2)), rate_card_version=9)),
    ("may not charge", 0, lambda world: world.hold(session_id(2), payer=1)),
    ("may not charge", 0, lambda world: replace(world.hold(session_id(2), payer=1), authorization=b"forged")),
    ("not above zero", 0, lambda world: world.hold(session_id(2), amount_microcredits=0)),
    ("exceed the hold", 0, two_receipts_above_the_hold),
    ("exceed the hold", 1, lambda world: ReceiptClaimed(world.head_signed(dear_receipt(world)))),
    ("its head opened no such hold", 1, lambda world: ReceiptClaimed(unheld_receipt(world, session=2))),
    ("its head opened no such hold", 1, lambda world: ReceiptClaimed(unheld_receipt(world, payer=1))),
    (
        "its head opened no such hold",
        1,
        lambda world: ReceiptClaimed(unheld_receipt(world, key_id=b"L" * 16)),
    ),
    ("may not issue", 1, lambda world: Issued(5)),
    ("not above zero", 0, lambda world: Issued(0)),
    ("may not open", 1, lambda world: AccountOpened(world.members[2], 1)),
    ("rate card 9", 1, lambda world: AccountOpened(world.members[1], 9)),
    ("may not move", 1, lambda world: Transferred(world.members[0], world.members[1], 5)),
    ("may not move", 1, lambda world: Transferred(TREASURY, world.members[1], 5)),
    ("not above zero", 1, lambda world: Transferred(world.members[1], world.members[0], 0)),
    ("are the same", 1, lambda world: Transferred(world.members[1], world.members[1], 5)),
    (
        "another stage's",
        0,
        lambda world: ReceiptClaimed(world.co_signed(world.receipt(session_id(1), stage=1))),
    ),
    (
        "amount is not the price",
        1,
        lambda world: ReceiptClaimed(world.co_signed(world.receipt(session_id(1), amount_microcredits=1))),
    ),
    (
        "another session's",
        1,
        lambda world: Disputed(
            session_id(2), DisputeReason.COUNTS, world.head_signed(world.receipt(session_id(1)))
        ),
    ),
]


@pytest.mark.parametrize(("reason", "author", "make"), RULES)
def test_a_broken_rule_is_refused_when_writing_and_when_receiving(
    world: World, reason: str, author: int, make: Refused
) -> None:
    """What an honest node refuses to write, every node refuses to take from one that is not honest."""
    writer, reader = world.ledger(author), world.ledger(2)
    hold = world.ledger(0).append(world.hold(session_id(1)))
    writer.ingest([hold.raw])
    reader.ingest([hold.raw])
    body, before = make(world), (writer.digest(), reader.digest())
    with pytest.raises(LedgerError, match=reason):
        writer.append(body)
    node = world.nodes[author]
    index, prev_hash = (1, hold.hash) if author == 0 else (0, FIRST_PREV_HASH)
    forced = sign_entry(POD, node.public, index, prev_hash, START_MS, body, node.sign)
    result = reader.ingest([forced.raw])
    assert result.num_new == 0
    (refusal,) = result.refused
    assert (refusal.author, refusal.index) == (node.public, index)
    assert reason in refusal.reason
    assert (writer.digest(), reader.digest()) == before


def test_strangers_and_other_pods_are_refused(world: World) -> None:
    stranger, node = Key("stranger"), world.nodes[1]
    forged = sign_entry(POD, world.nodes[0].public, 0, FIRST_PREV_HASH, START_MS, Issued(5), stranger.sign)
    result = world.ledger(2).ingest(
        [
            sign_entry(POD, stranger.public, 0, FIRST_PREV_HASH, START_MS, Issued(5), stranger.sign).raw,
            sign_entry(
                b"Q" * 32, node.public, 0, FIRST_PREV_HASH, START_MS, world.hold(session_id(1)), node.sign
            ).raw,
            forged.raw,
            b"noise",
        ]
    )
    assert result.num_new == 0
    reasons = sorted(refusal.reason for refusal in result.refused)
    assert [reason[:22] for reason in reasons] == [
        "it belongs to another ",
        "its author is not a no",
        "not an entry: not cano",
        "signature does not mat",
    ]


def test_a_refused_entry_is_taken_once_the_roster_knows_more(world: World) -> None:
    member = world.directory.members.pop(world.nodes[1].public)
    entry = World().ledger(1).append(world.hold(session_id(1), payer=1))
    ledger = world.ledger(0)
    assert ledger.ingest([entry.raw]).num_new == 0
    world.directory.members[world.nodes[1].public] = member
    assert ledger.ingest([entry.raw]).num_new == 1


def test_a_claim_waits_for_its_hold_and_is_taken_with_it(world: World) -> None:
    head, stage = world.ledger(2), world.ledger(0)
    hold = head.append(world.hold(session_id(1), payer=2))
    stage.ingest([hold.raw])
    claim = stage.append(
        ReceiptClaimed(world.head_signed(world.receipt(session_id(1), head=2, stage=0, payer=2)))
    )
    alone, together = world.ledger(1), world.ledger(1)
    assert alone.ingest([claim.raw]).num_new == 0
    assert alone.ingest([hold.raw]).num_new == 1
    assert alone.ingest([claim.raw]).num_new == 1
    # Whatever the authors' order: a batch that holds both needs no second round.
    result = together.ingest([claim.raw, hold.raw])
    assert (result.num_new, result.refused) == (2, ())
    assert together.digest() == alone.digest() == stage.digest()


def test_ingest_takes_a_shuffled_and_doubled_batch_once(world: World) -> None:
    writer, reader = world.ledger(0), world.ledger(1)
    for number in range(3):
        writer.append(world.hold(session_id(number)))
        writer.append(world.settlement(session_id(number), world.receipt(session_id(number))))
    found = raws(writer)
    result = reader.ingest(found[::-1] + found)
    assert (result.num_new, result.refused) == (6, ())
    assert reader.ingest(found).num_new == 0
    assert reader.digest() == writer.digest()
    assert reader.balances() == writer.balances()


def test_a_gap_is_refused_and_heals(world: World) -> None:
    writer, reader = world.ledger(0), world.ledger(1)
    entries = [writer.append(Issued(number)).raw for number in (1, 2, 3)]
    result = reader.ingest([entries[0], entries[2]])
    assert (result.num_new, [refusal.index for refusal in result.refused]) == (1, [2])
    assert "not here" in result.refused[0].reason
    assert reader.ingest(entries[1:]).num_new == 2


def test_the_books_after_a_restart_are_the_same(world: World, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.sqlite"
    ledger = world.ledger(0, url)
    ledger.append(AccountOpened(world.members[0], 1))
    for number in range(2):
        ledger.append(world.hold(session_id(number)))
    ledger.append(world.settlement(session_id(0), world.receipt(session_id(0))))
    before = (ledger.balances(), ledger.open_holds(), ledger.member_totals(), ledger.digest())
    ledger.close()
    again = world.ledger(0, url)
    assert (again.balances(), again.open_holds(), again.member_totals(), again.digest()) == before
    again.rebuild()
    assert again.balances() == before[0]
    assert again.append(HoldVoided(session_id(1), VoidReason.FAILED)).index == 4
    assert again.verify() == []
    again.close()


def test_threads_may_write_at_once(world: World, tmp_path: Path) -> None:
    ledger = world.ledger(0, f"sqlite:///{tmp_path}/ledger.sqlite")
    with ThreadPoolExecutor(8) as executor:
        entries = list(executor.map(lambda number: ledger.append(world.hold(session_id(number))), range(80)))
    assert sorted(entry.index for entry in entries) == list(range(80))
    assert ledger.verify() == []
    ledger.close()


@pytest.mark.parametrize("how", ["append", "ingest"])
def test_readers_do_not_wait_for_a_write_that_hangs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    ledger, other = world.ledger(0, f"sqlite:///{tmp_path}/ledger.sqlite"), world.ledger(1)
    ledger.append(Issued(1))
    other.append(AccountOpened(world.members[1], 1))
    has_begun, may_go_on, write = threading.Event(), threading.Event(), SqlJournal.write

    def write_late(self: SqlJournal, records: Iterable[Record]) -> None:
        has_begun.set()
        assert may_go_on.wait(60)
        write(self, records)

    def read() -> object:
        totals = (ledger.balances(), ledger.open_holds(), ledger.member_totals(), ledger.recent_sessions(9))
        return ledger.digest(), ledger.heads(), ledger.missing({}, 10_000), ledger.num_entries(), totals

    before = read()
    monkeypatch.setattr(SqlJournal, "write", write_late)
    with ThreadPoolExecutor(2) as executor:
        written = executor.submit(
            (lambda: ledger.append(Issued(2))) if how == "append" else (lambda: ledger.ingest(raws(other)))
        )
        try:
            assert has_begun.wait(60)
            assert executor.submit(read).result(20) == before
        finally:
            may_go_on.set()
        written.result(60)
    assert ledger.num_entries() == len(raws(ledger)) == 2
    assert ledger.verify() == []
    ledger.close()


def test_nothing_is_applied_that_could_not_be_written(world: World, tmp_path: Path) -> None:
    ledger = world.ledger(0, f"sqlite:///{tmp_path}/ledger.sqlite")
    ledger.append(Issued(1))
    limit_pages(ledger)
    with pytest.raises(JournalError, match="full"):
        append_many(ledger)
    assert ledger.num_entries() == len(raws(ledger)) > 1
    assert ledger.balance(TREASURY) == ledger.num_entries()
    before = ledger.digest()
    ledger.rebuild()
    assert (ledger.digest(), ledger.balance(TREASURY)) == (before, ledger.num_entries())
    assert ledger.verify() == []
    ledger.close()


def append_many(ledger: Ledger) -> None:
    for _ in range(10_000):
        ledger.append(Issued(1))


def limit_pages(ledger: Ledger) -> None:
    """Make SQLite say that the disk is full after a few more entries."""
    journal = ledger._journal
    with journal._engine.connect() as connection:  # type: ignore[attr-defined]
        num_pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {num_pages + 4}")
