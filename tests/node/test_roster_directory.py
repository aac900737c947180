"""Who may charge whom: only a gateway that was shown the bearer of the payer's own API key."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ledger.entry import MAX_AUTHORIZATION_BYTES, HoldOpened
from node.roster_directory import RosterDirectory
from node.sessions.authorization import authorize, fits
from pod.api_key import Delegation, delegate
from pod.canonical import decode, encode
from pod.identity import KeyPair
from pod.roster.apply import roster_of
from pod.roster.events import MemberRemoved
from tests.pod.people import NOW_MS, Story, key_of

NODE = b"N" * 32


def told() -> Story:
    story = Story()
    story.member("mark")
    story.member("mira")
    return story


STORY = told()


def directory(story: Story = STORY) -> RosterDirectory:
    roster = roster_of(story.pod, story.said)
    return RosterDirectory(lambda: roster)


def key(who: str = "mark", pod: bytes = STORY.pod) -> tuple[KeyPair, Delegation]:
    member = key_of(who)
    return delegate(pod, member.public, member.sign, "laptop", NOW_MS)


def hold(delegation: Delegation, who: str = "mark") -> HoldOpened:
    return HoldOpened(
        session=b"S" * 16,
        payer=key_of(who).public,
        key_id=delegation.key_id,
        model=b"M" * 32,
        amount_microcredits=500,
        expires_at_ms=NOW_MS + 1,
        rate_card_version=1,
    )


def authorized() -> HoldOpened:
    bearer, delegation = key()
    bare = hold(delegation)
    return replace(bare, authorization=authorize(delegation, bearer.sign, NODE, bare))


def test_a_gateway_that_was_shown_the_key_may_charge_its_member() -> None:
    assert directory().may_charge(NODE, authorized())
    assert len(authorized().authorization) <= MAX_AUTHORIZATION_BYTES


@pytest.mark.parametrize(
    "changes",
    [
        {"session": b"T" * 16},
        {"payer": key_of("mira").public},
        {"key_id": b"L" * 16},
        {"amount_microcredits": 501},
        {"expires_at_ms": NOW_MS + 2},
        {"authorization": b""},
        {"authorization": b"\xff" * 90},
        {"authorization": encode([b"", b""])},
        {"authorization": encode([1, 2])},
    ],
)
def test_an_authorization_is_for_one_hold(changes: dict[str, object]) -> None:
    assert not directory().may_charge(NODE, replace(authorized(), **changes))  # type: ignore[arg-type]


def test_an_authorization_is_for_one_gateway() -> None:
    assert not directory().may_charge(b"O" * 32, authorized())


def test_the_delegation_alone_charges_nobody() -> None:
    """Other nodes may see the delegation; what it names is public, the bearer's key is not."""
    _, delegation = key()
    bare, forger = hold(delegation), KeyPair.create()
    forged = replace(bare, authorization=authorize(delegation, forger.sign, NODE, bare))
    assert not directory().may_charge(NODE, forged)


def test_a_delegation_of_somebody_else_or_another_pod_charges_nobody() -> None:
    for bearer, delegation in (key("mira"), key(pod=b"Q" * 32)):
        bare = hold(delegation)
        other = replace(bare, authorization=authorize(delegation, bearer.sign, NODE, bare))
        assert not directory().may_charge(NODE, other)


def test_who_never_was_a_member_cannot_be_charged() -> None:
    """Else anybody could earn from accounts made up for the purpose."""
    bearer, delegation = key("stranger")
    bare = hold(delegation, "stranger")
    made_up = replace(bare, authorization=authorize(delegation, bearer.sign, NODE, bare))
    assert not directory().may_charge(NODE, made_up)


def test_no_single_hold_is_above_the_key_s_cap() -> None:
    member = key_of("mark")
    for cap_microcredits, may in ((500, True), (499, False)):
        bearer, delegation = delegate(
            STORY.pod, member.public, member.sign, "n", NOW_MS, cap_microcredits=cap_microcredits
        )
        bare = hold(delegation)
        shown = replace(bare, authorization=authorize(delegation, bearer.sign, NODE, bare))
        assert directory().may_charge(NODE, shown) is may


def test_the_answer_is_the_same_after_the_member_left() -> None:
    story = told()
    story.say("olga", MemberRemoved(key_of("mark").public, tuple(e.hash for e in story.said)))
    assert directory(story).may_charge(NODE, authorized())


def test_a_key_of_many_models_does_not_fit() -> None:
    member = key_of("mark")
    _, delegation = delegate(STORY.pod, member.public, member.sign, "n", NOW_MS, models=("m" * 256,) * 4)
    assert not fits(delegation)
    assert fits(key()[1])
    assert isinstance(decode(authorized().authorization, 1024), list)
