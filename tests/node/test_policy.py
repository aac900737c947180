"""Policies of the roster as rate cards: which is in force, and that versions outlive their publishers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations, permutations

import pytest

from ledger.entry import TREASURY, AccountOpened
from ledger.ledger import MEMORY_URL, Ledger
from ledger.rate_card import DEFAULT_RATE_CARD, RateCard
from ledger.receipt import SignedReceipt, co_sign, expected_amount, sign_as_head
from node.policy import policy_in_force, rate_card_of, recent_rate_cards
from node.roster_directory import RosterDirectory
from pod.roster.apply import roster_of
from pod.roster.events import Event, MemberRemoved, PolicySet, Role, RoleChanged
from pod.roster.log import RosterLog
from tests.ledger.world import World, session_id
from tests.pod.people import NOW_MS, Story, key_of

CHEAP = replace(DEFAULT_RATE_CARD, levy_per_mille=10)
DEAR = replace(DEFAULT_RATE_CARD, levy_per_mille=200, output_weight_per_mille=3_000)
RICH = replace(DEFAULT_RATE_CARD, starter_grant_microcredits=10**12)


def told() -> Story:
    story = Story()
    story.member("adam", Role.ADMIN)
    story.member("mark")
    return story


def published(card: RateCard, number: int = 2) -> PolicySet:
    return PolicySet(card.numbered(number).encode())


def directory(pod: bytes, events: Iterable[Event]) -> RosterDirectory:
    roster = roster_of(pod, events)
    return RosterDirectory(lambda: roster)


def test_a_pod_begins_with_the_first_card() -> None:
    story = told()
    roster = roster_of(story.pod, story.said)
    assert policy_in_force(roster) == (DEFAULT_RATE_CARD, None)
    assert recent_rate_cards(roster) == (DEFAULT_RATE_CARD,)
    assert directory(story.pod, story.said).rate_cards(1) == (DEFAULT_RATE_CARD,)
    assert directory(story.pod, story.said).rate_cards(CHEAP.numbered(2).version) == ()


def test_the_newest_policy_of_owner_or_admin_is_in_force() -> None:
    story = told()
    story.say("olga", published(CHEAP))
    story.say("adam", published(DEAR, 3))
    story.say("mark", published(CHEAP, 4))
    roster = roster_of(story.pod, story.said)
    card, policy = policy_in_force(roster)
    assert card == DEAR.numbered(3) == rate_card_of(roster)
    assert policy is not None
    assert (policy.author, policy.time_ms) == (key_of("adam").public, NOW_MS)
    assert directory(story.pod, story.said).rate_cards(CHEAP.numbered(4).version) == ()


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"\xff" * 60_000,
        DEFAULT_RATE_CARD.encode(),
        replace(DEAR, version=2).encode(),
        replace(DEAR.numbered(9), levy_per_mille=1_000).encode(),
    ],
    ids=["empty", "noise", "the first card", "a bare number", "a number of other content"],
)
def test_a_policy_that_cannot_be_is_passed_over(junk: bytes) -> None:
    story = told()
    story.say("olga", published(CHEAP))
    story.say("olga", PolicySet(junk))
    roster = roster_of(story.pod, story.said)
    assert rate_card_of(roster) == CHEAP.numbered(2)
    assert directory(story.pod, story.said).rate_cards(1) == (DEFAULT_RATE_CARD,)


def test_only_the_owner_raises_the_starter_grant() -> None:
    """What an admin signed is known for good, so it must not pay out more than the pod agreed to."""
    story = told()
    story.say("adam", published(RICH))
    assert rate_card_of(roster_of(story.pod, story.said)) == DEFAULT_RATE_CARD
    assert directory(story.pod, story.said).rate_cards(RICH.numbered(2).version) == ()
    story.say("olga", published(RICH))
    assert rate_card_of(roster_of(story.pod, story.said)) == RICH.numbered(2)
    assert directory(story.pod, story.said).rate_cards(RICH.numbered(2).version) == (RICH.numbered(2),)


def test_the_same_number_from_two_partitions_is_two_versions() -> None:
    story = told()
    ours = story.say("olga", published(CHEAP), lamport=7)
    theirs = story.say("adam", published(DEAR), lamport=7)
    common = [event for event in story.said if event not in (ours, theirs)]
    for seen in ([ours], [theirs], [ours, theirs]):
        known = directory(story.pod, [*common, *seen])
        for card, event in ((CHEAP, ours), (DEAR, theirs)):
            version = card.numbered(2).version
            assert known.rate_cards(version) == ((card.numbered(2),) if event in seen else ())
    last = DEAR if theirs.order > ours.order else CHEAP
    for order in permutations([ours, theirs]):
        assert rate_card_of(roster_of(story.pod, [*common, *order])) == last.numbered(2)


def test_a_policy_of_an_admin_that_was_removed_since_keeps_its_meaning() -> None:
    """Another part of the pod may have used it before it heard of the removal, which cuts it."""
    story = told()
    before = tuple(event.hash for event in story.said)
    story.say("adam", published(DEAR), lamport=20)
    used = DEAR.numbered(2)
    assert directory(story.pod, story.said).rate_cards(used.version) == (used,)
    story.say("olga", MemberRemoved(key_of("adam").public, before), lamport=21)
    roster = roster_of(story.pod, story.said)
    assert rate_card_of(roster) == DEFAULT_RATE_CARD
    assert directory(story.pod, story.said).rate_cards(used.version) == (used,)


def test_a_policy_of_an_admin_whose_role_was_lowered_since_keeps_its_meaning() -> None:
    story = told()
    story.say("olga", RoleChanged(key_of("mark").public, Role.ADMIN, ()))
    story.say("mark", published(DEAR))
    story.say("olga", RoleChanged(key_of("mark").public, Role.MEMBER, ()))
    assert rate_card_of(roster_of(story.pod, story.said)) == DEFAULT_RATE_CARD
    assert directory(story.pod, story.said).rate_cards(DEAR.numbered(2).version) == (DEAR.numbered(2),)


def test_no_event_takes_a_version_away() -> None:
    """Every subset of a pod's events knows no more than one with another event."""
    story = told()
    optional = [
        story.say("adam", published(DEAR)),
        story.say("olga", MemberRemoved(key_of("adam").public, ())),
        story.say("olga", RoleChanged(key_of("mark").public, Role.ADMIN, ())),
        story.say("mark", published(CHEAP)),
        story.say("olga", MemberRemoved(key_of("mark").public, ())),
        story.say("olga", published(RICH)),
    ]
    common = [event for event in story.said if event not in optional]
    versions = [card.numbered(2).version for card in (DEAR, CHEAP, RICH)]

    def known(events: Sequence[Event]) -> set[RateCard]:
        asked = directory(story.pod, [*common, *events])
        return {card for version in versions for card in asked.rate_cards(version)}

    for size in range(len(optional)):
        for events in combinations(optional, size):
            for more in optional:
                assert known(events) <= known([*events, more])


def test_a_log_keeps_what_a_former_admin_published() -> None:
    """Also one that heard of the removal first: the entries of others name that version."""
    story = told()
    common = list(story.said)
    policy = story.say("adam", published(DEAR), lamport=20)
    removal = story.say("olga", MemberRemoved(key_of("adam").public, ()), lamport=21)
    log = RosterLog(None, story.pod)
    log.add_all(common)
    log.add(removal)
    assert log.add(policy)
    known = RosterDirectory(lambda: log.roster)
    assert known.rate_cards(DEAR.numbered(2).version) == (DEAR.numbered(2),)


def test_stages_accept_the_newest_cards_only() -> None:
    story = told()
    cards = [replace(DEFAULT_RATE_CARD, levy_per_mille=levy).numbered(levy) for levy in range(2, 8)]
    for card in cards:
        story.say("olga", PolicySet(card.encode()))
    assert recent_rate_cards(roster_of(story.pod, story.said)) == tuple(cards[-4:])
    story.say("olga", PolicySet(cards[3].encode()))
    assert recent_rate_cards(roster_of(story.pod, story.said)) == (cards[2], *cards[4:], cards[3])


def twins() -> tuple[RateCard, RateCard]:
    """Two cards with one version, as an admin can find them by trying, with the same prices."""
    seen: dict[int, RateCard] = {}
    for line in range(10**6):
        for levy in (20, 150):
            card = replace(DEFAULT_RATE_CARD, credit_line_microcredits=line, levy_per_mille=levy).numbered(2)
            other = seen.setdefault(card.version, card)
            if other.levy_per_mille != card.levy_per_mille:
                return (other, card) if other.levy_per_mille == 150 else (card, other)
    raise AssertionError("no two cards share a version")


class Pair:
    """Two replicas that hear of roster events one by one; member 0's node is a head, member 1's a stage."""

    def __init__(self) -> None:
        self.world, self.story = World(), told()
        self.known: list[list[Event]] = [list(self.story.said), list(self.story.said)]
        self.ledgers = [self._ledger(number) for number in range(2)]

    def _ledger(self, number: int) -> Ledger:
        world = self.world
        asked = RosterDirectory(lambda: roster_of(self.story.pod, self.known[number]))
        world_directory = world.directory

        class Both:
            def __getattr__(self, name: str) -> object:
                return getattr(asked if name == "rate_cards" else world_directory, name)

        node = world.nodes[number]
        return Ledger.open(MEMORY_URL, self.story.pod, Both(), node.public, node.sign, world.clock)  # type: ignore[arg-type]

    def receipt(self, number: int, card: RateCard) -> SignedReceipt:
        draft = replace(
            self.world.receipt(session_id(number)), pod=self.story.pod, rate_card_version=card.version
        )
        receipt = replace(draft, amount_microcredits=expected_amount(draft, card))
        return co_sign(sign_as_head(receipt, self.world.nodes[0].sign), self.world.nodes[1].sign)

    def work(self, number: int, card: RateCard) -> None:
        ledger, world = self.ledgers[0], self.world
        ledger.append(replace(world.hold(session_id(number)), rate_card_version=card.version))
        settled = world.settlement(session_id(number))
        ledger.append(replace(settled, num_output_tokens=20, receipts=(self.receipt(number, card),)))

    def exchange(self) -> None:
        for one, other in (self.ledgers, self.ledgers[::-1]):
            one.ingest(other.missing(one.heads(), 1 << 30)[0])


def test_a_version_with_two_contents_ends_equal_everywhere() -> None:
    """The lower levy of those with the receipt's price counts, also for what was entered before."""
    dear, cheap = twins()
    pair = Pair()
    first = pair.story.say("adam", PolicySet(dear.encode()))
    second = pair.story.say("adam", PolicySet(cheap.encode()))
    pair.known[0].append(first)
    pair.known[1].append(second)
    pair.work(1, dear)
    amount = pair.receipt(1, dear).receipt.amount_microcredits
    assert pair.ledgers[0].balance(TREASURY) == dear.levy(amount)
    pair.known[0].append(second)
    pair.known[1].append(first)
    pair.exchange()
    pair.ledgers[0].append(AccountOpened(pair.world.members[0], 1))
    pair.exchange()
    assert pair.ledgers[0].balances() == pair.ledgers[1].balances()
    assert pair.ledgers[0].treasury().levied_microcredits == cheap.levy(amount)
    assert [ledger.verify() for ledger in pair.ledgers] == [[], []]


def test_an_entry_with_an_unknown_version_waits_for_the_roster() -> None:
    pair = Pair()
    event = pair.story.say("adam", published(DEAR))
    pair.known[0].append(event)
    pair.work(1, DEAR.numbered(2))
    pair.exchange()
    assert pair.ledgers[1].num_entries() == 0
    pair.known[1].append(event)
    pair.exchange()
    assert pair.ledgers[0].balances() == pair.ledgers[1].balances()
    assert pair.ledgers[1].num_entries() == 2
