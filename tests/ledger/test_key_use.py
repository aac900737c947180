"""What the books know of an API key: what it paid, what it holds, when it was used, at which gateway."""

from __future__ import annotations

import itertools

from ledger import key_use
from ledger.books import Books
from ledger.entry import Entry, HoldVoided, VoidReason, decode_entry
from ledger.key_use import KeyUses
from ledger.ledger import Ledger
from tests.ledger.world import KEY, START_MS, World, raws, session_id


def used_at_two_gateways(world: World) -> tuple[Ledger, Ledger]:
    """Node 0 settles one session and holds another, a second later node 1 settles one; both know all."""
    first, second = world.ledger(0), world.ledger(1)
    first.append(world.hold(session_id(1)))
    first.append(world.settlement(session_id(1), world.receipt(session_id(1), head=0, stage=2)))
    first.append(world.hold(session_id(2), amount_microcredits=70))
    world.clock.now_ms += 1000
    second.append(world.hold(session_id(3), head=1))
    second.append(world.settlement(session_id(3), world.receipt(session_id(3), head=1, stage=2)))
    first.ingest(raws(second))
    second.ingest(raws(first))
    return first, second


def test_a_key_has_spent_and_holds_the_same_at_every_gateway() -> None:
    world = World()
    first, second = used_at_two_gateways(world)
    member, paid = world.members[0], world.receipt(session_id(1)).amount_microcredits
    for ledger in (first, second):
        use = ledger.key_use(member, KEY, START_MS)
        assert (use.spent_microcredits, use.held_microcredits) == (2 * paid, 70)
        assert ledger.key_spent_microcredits(member, KEY) == 2 * paid
        assert ledger.num_key_sessions_since(member, KEY, START_MS) == 3
        assert ledger.num_key_sessions_since(member, KEY, START_MS + 1) == 1
    assert first.key_spent_microcredits(member, b"other key".ljust(16)) == 0
    assert first.key_spent_microcredits(world.members[1], KEY) == 0


def test_only_other_gateways_sessions_are_told_with_their_tokens() -> None:
    world = World()
    first, second = used_at_two_gateways(world)
    seen = first.key_use(world.members[0], KEY, START_MS)
    assert (seen.opened_ms, seen.settled) == ((START_MS + 1000,), ((START_MS + 1000, 30),))
    seen = second.key_use(world.members[0], KEY, START_MS)
    assert (seen.opened_ms, seen.settled) == ((START_MS, START_MS), ((START_MS, 30),))
    assert second.key_use(world.members[0], KEY, START_MS + 1).opened_ms == ()
    # What it did before it began to count by itself is told, too.
    seen = first.key_use(world.members[0], KEY, START_MS, known_from_ms=START_MS + 1)
    assert (seen.opened_ms, len(seen.settled)) == ((START_MS, START_MS, START_MS + 1000), 2)


def test_a_hold_that_ended_or_expired_is_held_no_more() -> None:
    world = World()
    ledger = world.ledger(0)
    ledger.append(world.hold(session_id(1), amount_microcredits=5))
    ledger.append(world.hold(session_id(2), amount_microcredits=7))
    ledger.append(HoldVoided(session_id(1), VoidReason.CANCELLED))
    assert ledger.key_use(world.members[0], KEY, START_MS).held_microcredits == 7
    world.clock.now_ms += 60_000
    assert ledger.key_use(world.members[0], KEY, START_MS).held_microcredits == 0


def test_entries_in_any_order_say_the_same_of_a_key() -> None:
    world = World()
    ledger = world.ledger(0)
    ledger.append(world.hold(session_id(1)))
    world.clock.now_ms += 5
    ledger.append(world.settlement(session_id(1), world.receipt(session_id(1), head=0, stage=2)))
    world.clock.now_ms += 5
    ledger.append(world.hold(session_id(2)))
    entries: list[Entry] = [decode_entry(raw) for raw in raws(ledger)]
    seen = set()
    for order in itertools.permutations(entries):
        books = Books(world.directory)
        for entry in order:
            books.apply(entry)
        seen.add(books.key_use(world.members[0], KEY, world.clock.now_ms, START_MS, b"elsewhere", 0))
    (use,) = seen
    assert use.opened_ms == (START_MS, START_MS + 10)
    assert use.settled == ((START_MS + 5, 30),)


def test_the_latest_sessions_of_a_key_are_kept_and_no_more() -> None:
    uses, key = KeyUses(), (b"m", b"k")
    for number in range(key_use.MAX_NUM_RECENT + 3):
        uses.open(key, b"head", session_id(number), None, number)
    opened = uses.opened_since(key, 0)
    assert len(opened) == key_use.MAX_NUM_RECENT
    assert opened[0] == (3, b"head", session_id(3), 0)
    uses.open(key, b"head", session_id(9), 9, 10_000_000)
    assert uses.opened_since(key, 10_000_000) == [(10_000_000, b"head", session_id(9), 0)]
    assert len(uses.opened_since(key, 0)) == key_use.MAX_NUM_RECENT
