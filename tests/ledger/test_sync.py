"""Replicas end equal: through loss, doubling, reordering, small batches, and forks of every depth."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger import sync
from ledger.chains import MAX_NUM_BRANCHES, Tip
from ledger.entry import Issued, ReceiptClaimed, sign_entry
from ledger.ledger import Ledger, LedgerError
from tests.ledger.world import POD, START_MS, World, raws, session_id

MAX_NUM_ROUNDS = 400


def pull(reader: Ledger, writer: Ledger, max_bytes: int = 1 << 20) -> bool:
    """One exchange, through the encoded forms; whether there was more to fetch."""
    theirs = sync.decode_heads(sync.encode_heads(reader.heads()))
    found, has_more = writer.missing(theirs, max_bytes)
    reader.ingest(sync.decode_batch(sync.encode_batch(found)))
    return has_more


def converge(ledgers: list[Ledger], max_bytes: int = 1 << 20) -> int:
    """Pull around in a ring until all digests are equal; the number of rounds."""
    for number in range(MAX_NUM_ROUNDS):
        if len({ledger.digest() for ledger in ledgers}) == 1:
            return number
        for reader, writer in zip(ledgers, ledgers[1:] + ledgers[:1], strict=True):
            pull(reader, writer, max_bytes)
    raise AssertionError("the replicas do not converge")


def work(world: World, ledgers: list[Ledger], choice: random.Random, num_sessions: int) -> None:
    for number in range(num_sessions):
        head, payer = choice.randrange(3), choice.randrange(3)
        session = session_id(number)
        ledgers[head].append(world.hold(session, payer=payer, head=head))
        receipts = [
            world.receipt(session, head=head, payer=payer, stage=stage, stage_index=stage)
            for stage in choice.sample(range(3), choice.randint(1, 2))
        ]
        if choice.random() < 0.8:
            ledgers[head].append(world.settlement(session, *receipts))
        if choice.random() < 0.4:
            stage = choice.choice(receipts)
            claim = ReceiptClaimed(world.co_signed(stage))
            ledgers[stage.stage_index].ingest(raws(ledgers[head]))
            ledgers[stage.stage_index].append(claim)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_loss_doubling_and_reordering_leave_no_trace(seed: int) -> None:
    choice, world = random.Random(seed), World()
    ledgers = [world.ledger(number) for number in range(3)]
    work(world, ledgers, choice, num_sessions=6)
    for _ in range(30):
        reader, writer = choice.sample(ledgers, 2)
        found, _ = writer.missing(reader.heads(), choice.choice([100, 2_000, 1 << 20]))
        delivered = [raw for raw in found * 2 if choice.random() < 0.7]
        choice.shuffle(delivered)
        reader.ingest(delivered)
        assert sum(reader.balances().values()) == 0
    converge(ledgers)
    assert ledgers[0].balances() == ledgers[1].balances() == ledgers[2].balances()
    assert ledgers[0].member_totals() == ledgers[1].member_totals() == ledgers[2].member_totals()
    assert [ledger.verify() for ledger in ledgers] == [[], [], []]


def test_missing_pages_through_a_long_journal() -> None:
    world = World()
    writer, reader = world.ledger(0), world.ledger(1)
    for _ in range(600):
        writer.append(Issued(1))
    num_pulls = 1
    while pull(reader, writer, max_bytes=20_000):
        num_pulls += 1
    assert reader.digest() == writer.digest()
    assert num_pulls == -(-sum(map(len, raws(writer))) // 20_000)
    assert writer.missing(reader.heads(), 1 << 20) == ([], False)


def test_one_entry_is_sent_however_small_the_limit() -> None:
    world = World()
    writer = world.ledger(0)
    writer.append(Issued(1))
    writer.append(Issued(2))
    found, has_more = writer.missing({}, 1)
    assert (len(found), has_more) == (1, True)


def forked(num_common: int, lengths: tuple[int, int]) -> tuple[World, list[Ledger]]:
    """Node 0's key writes on in two places after `num_common` entries; one replica saw each branch."""
    world = World()
    twins = [world.ledger(0), world.ledger(0)]
    for _ in range(num_common):
        twins[1].ingest([twins[0].append(Issued(1)).raw])
    readers = [world.ledger(1), world.ledger(2)]
    for branch, (twin, length) in enumerate(zip(twins, lengths, strict=True)):
        for _ in range(length):
            twin.append(Issued(100 + branch))
        readers[branch].ingest(raws(twin))
    return world, readers


@pytest.mark.parametrize("num_common", [0, 1, 2, 9])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 2), (3, 1), (7, 4), (12, 40)])
def test_a_fork_is_found_kept_and_ends_equal(num_common: int, lengths: tuple[int, int]) -> None:
    world, readers = forked(num_common, lengths)
    converge(readers)
    author = world.nodes[0].public
    for reader in readers:
        (fork,) = reader.forks()
        assert (fork.author, fork.index, len(fork.hashes)) == (author, num_common, 2)
        assert reader.is_frozen(author)
        assert reader.num_entries() == num_common + sum(lengths)
        # Both branches count: what the author signed stands, so a fork takes nothing back.
        assert reader.balance(b"issuance") == -(num_common + 100 * lengths[0] + 101 * lengths[1])
    verdicts = [[str(violation) for violation in reader.verify()] for reader in readers]
    assert verdicts[0] == verdicts[1]
    assert verdicts[0] == [f"entry {num_common} of {author.hex()[:8]}: fork: 2 entries with this index"]


def test_a_fork_ends_equal_with_small_batches_too() -> None:
    _, readers = forked(300, (5, 290))
    assert converge(readers, max_bytes=3_000) < MAX_NUM_ROUNDS
    assert len(readers[0].forks()) == 1


def test_ingest_reports_a_new_fork_once_and_the_author_writes_no_more() -> None:
    world = World()
    twins = [world.ledger(0), world.ledger(0)]
    rivals = [twin.append(Issued(number + 1)) for number, twin in enumerate(twins)]
    result = twins[0].ingest([rivals[1].raw])
    (fork,) = result.forks
    assert fork.hashes == tuple(sorted(entry.hash for entry in rivals))
    assert twins[0].ingest([rivals[1].raw]).forks == ()
    with pytest.raises(LedgerError, match="forked"):
        twins[0].append(Issued(5))
    other = world.ledger(1)
    other.ingest(raws(twins[0]))
    other.append(world.hold(session_id(1), payer=1))
    assert not other.is_frozen(world.nodes[1].public)


def test_a_node_restored_from_an_old_copy_takes_its_own_later_entries_back() -> None:
    world = World()
    original, peer = world.ledger(0), world.ledger(1)
    for number in range(3):
        original.append(Issued(number + 1))
    peer.ingest(raws(original))
    restored = world.ledger(0)
    restored.ingest(raws(original)[:1])
    pull(restored, peer)
    assert restored.append(Issued(9)).index == 3
    assert restored.forks() == []


def test_one_author_cannot_make_others_store_branches_without_end() -> None:
    world = World()
    node, reader = world.nodes[0], world.ledger(1)
    rivals = [
        sign_entry(POD, node.public, 0, bytes(32), START_MS + number, Issued(1), node.sign).raw
        for number in range(MAX_NUM_BRANCHES + 3)
    ]
    result = reader.ingest(rivals)
    assert result.num_new == MAX_NUM_BRANCHES
    assert [refusal.reason for refusal in result.refused] == ["its author forked too often"] * 3


def replicas_of_a_forker(num_branches: int) -> tuple[World, list[Ledger]]:
    """Node 0 forks: two replicas took as many branches as a replica keeps, and no branch in common."""
    world = World()
    node, readers = world.nodes[0], [world.ledger(1), world.ledger(2)]
    for number, reader in enumerate(readers):
        for branch in range(num_branches):
            time_ms = START_MS + 100 * number + branch
            reader.ingest([sign_entry(POD, node.public, 0, bytes(32), time_ms, Issued(1), node.sign).raw])
    return world, readers


@pytest.mark.parametrize("max_bytes", [1, 1_000, 1 << 20])
def test_a_forking_member_does_not_stop_honest_authors(max_bytes: int) -> None:
    world, readers = replicas_of_a_forker(MAX_NUM_BRANCHES)
    for number, reader in enumerate(readers):
        for session in range(3):
            reader.append(world.hold(session_id(session), payer=number + 1))
    for _ in range(8):
        pull(readers[0], readers[1], max_bytes)
        pull(readers[1], readers[0], max_bytes)
    for reader in readers:
        assert len(reader.open_holds()) == 6
        assert reader.is_frozen(world.nodes[0].public)
    # Nothing that would be refused is offered again.
    assert readers[0].missing(readers[1].heads(), max_bytes) == ([], False)
    assert readers[1].missing(readers[0].heads(), max_bytes) == ([], False)


def test_a_full_replica_still_takes_what_follows_its_own_branches() -> None:
    world, (first, second) = replicas_of_a_forker(MAX_NUM_BRANCHES)
    third = World().ledger(1)
    third.ingest(raws(first))
    node = world.nodes[0]
    tip = first.heads()[node.public][3]
    first.ingest([sign_entry(POD, node.public, 1, tip.hash, START_MS, Issued(9), node.sign).raw])
    pull(third, first)
    assert third.digest() == first.digest()
    assert first.missing(second.heads(), 1 << 20) == ([], False)


def test_every_author_moves_on_in_each_piece() -> None:
    """An author whose entries wait for another's does not keep that other back."""
    world = World()
    stage, head = sorted((0, 1), key=lambda number: world.nodes[number].public)
    ledgers, reader = {number: world.ledger(number) for number in (stage, head)}, world.ledger(2)
    for number in range(30):
        ledgers[head].append(world.hold(session_id(number), payer=head))
    ledgers[stage].ingest(raws(ledgers[head]))
    for number in range(30):
        receipt = world.receipt(session_id(number), head=head, stage=stage, payer=head)
        ledgers[stage].append(ReceiptClaimed(world.head_signed(receipt)))
    for _ in range(200):
        before = reader.num_entries()
        if not pull(reader, ledgers[stage], max_bytes=2_000):
            break
        assert reader.num_entries() > before
    assert reader.digest() == ledgers[stage].digest()


def test_heads_survive_their_encoding() -> None:
    heads = {b"a" * 32: (Tip(3, b"x" * 32),), b"b" * 32: (Tip(0, b"y" * 32), Tip(7, b"z" * 32))}
    assert sync.decode_heads(sync.encode_heads(heads)) == heads
    assert sync.digest(heads) == sync.digest(dict(reversed(heads.items())))


@pytest.mark.parametrize(
    "raw",
    [b"", b"\xa0", b"\xff" * 9, sync.encode_batch([b"short"]), sync.encode_batch([b"x" * 32 + b"\xff" * 40])],
)
def test_hostile_heads_are_refused(raw: bytes) -> None:
    with pytest.raises(sync.SyncError):
        sync.decode_heads(raw)


def test_hostile_batches_are_refused() -> None:
    for raw in (b"", b"\x01", sync.encode_batch([b"x" * 70_000]), b"x" * (5 * 1024 * 1024)):
        with pytest.raises(sync.SyncError):
            sync.decode_batch(raw)
