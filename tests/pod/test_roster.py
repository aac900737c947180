"""The roster: the same for any arrival order, and nobody gains by backdating, replaying or outranking."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pod.canonical import encode
from pod.identity import certificate
from pod.roster.apply import MAX_NUM_ADMIN_NODES, MAX_NUM_NODES, RosterError, roster_of
from pod.roster.cuts import kept_of_invite, kept_of_member
from pod.roster.events import (
    MAX_NUM_KEPT,
    EventError,
    InviteIssued,
    InviteRevoked,
    KeyIssued,
    KeyRevoked,
    LimitedKeyIssued,
    MemberJoined,
    MemberRemoved,
    ModelDeployed,
    ModelRemoved,
    NodeAdded,
    NodeRemoved,
    PolicySet,
    Role,
    RoleChanged,
    decode_event,
    node_added,
)
from pod.roster.roster import InviteState, Roster
from tests.pod.people import HOUR_MS, NOW_MS, Story, key_of

NAMES = ("olga", "adam", "anna", "mark", "mira", "gus")


def names(roster: Roster) -> set[str]:
    return {member.name for member in roster.members.values()}


def everyone() -> Story:
    story = Story()
    story.member("adam", Role.ADMIN)
    story.member("anna", Role.ADMIN)
    story.member("mark")
    story.member("mira")
    story.member("gus", Role.GUEST)
    return story


@st.composite
def stories(draw: st.DrawFn) -> Story:
    """Anything anybody may try to say, with numbers that overlap as in a partitioned pod."""
    story = everyone()
    first = len(story.said)
    for index in range(draw(st.integers(1, 12))):
        who, whom = draw(st.sampled_from(NAMES)), draw(st.sampled_from(NAMES))
        lamport = draw(st.integers(1, first + 6))
        match draw(st.integers(0, 7)):
            case 0:
                story.invite(who, f"word {index % 3}", draw(st.sampled_from(Role)), lamport=lamport)
            case 1:
                story.join(who, f"new {index}", f"word {index % 3}", lamport=lamport)
            case 2:
                kept = tuple(e.hash for e in story.said if draw(st.booleans()))[:20]
                story.say(who, MemberRemoved(key_of(whom).public, kept), lamport)
            case 3:
                kept = tuple(e.hash for e in story.said if draw(st.booleans()))[:20]
                story.say(who, RoleChanged(key_of(whom).public, draw(st.sampled_from(Role)), kept), lamport)
            case 4:
                story.say(who, NodeRemoved(key_of(f"{whom}'s node").public), lamport)
            case 5:
                node = key_of(f"node {index % 2}")
                story.say(who, node_added(story.pod, key_of(who).public, node, "second"), lamport)
            case 6:
                story.say(who, PolicySet(bytes([index])), lamport)
            case _:
                kept = tuple(e.hash for e in story.said if draw(st.booleans()))[-20:]
                story.say(who, InviteRevoked(key_of(f"word {index % 3}").public, kept), lamport)
    return story


@settings(max_examples=60, deadline=None)
@given(stories(), st.randoms(use_true_random=False))
def test_the_same_events_in_any_order_give_the_same_roster(story: Story, shuffler: random.Random) -> None:
    expected = roster_of(story.pod, story.said)
    shuffled = story.said * 2
    shuffler.shuffle(shuffled)
    assert roster_of(story.pod, shuffled) == expected
    assert expected.owner.name == "olga"
    assert all(node.member in expected.members for node in expected.nodes.values())


def test_a_one_use_invite_redeemed_twice_admits_the_first_and_shows_the_loser() -> None:
    story = everyone()
    story.invite("olga", "one use")
    lamport = len(story.said)
    events = {story.join("mark", "lena", "one use", lamport), story.join("mira", "lars", "one use", lamport)}
    first, second = (event for event in story.said if event in events and event.order == event.order)
    winner = min((first, second), key=lambda event: event.order)
    for order in (story.said, story.said[::-1]):
        roster = roster_of(story.pod, order)
        won, lost = ("lena", "lars") if winner is first else ("lars", "lena")
        assert won in names(roster)
        assert lost not in names(roster)
        assert [join.name for join in roster.lost_joins] == [lost]
        assert key_of(f"{lost}'s node").public not in roster.nodes
        assert roster.invites[key_of("one use").public].state(NOW_MS) is InviteState.USED


def test_what_a_removed_member_says_later_or_backdates_counts_for_nothing() -> None:
    story = everyone()
    story.invite("adam", "kept")
    kept = tuple(event.hash for event in story.said if event.author == key_of("adam").public)
    story.say("olga", MemberRemoved(key_of("adam").public, kept))
    story.invite("adam", "later")
    story.invite("adam", "backdated", lamport=4)
    story.say("adam", PolicySet(b"mine"), lamport=4)
    story.say("adam", MemberRemoved(key_of("mark").public, ()), lamport=4)
    roster = roster_of(story.pod, story.said)
    assert "adam" not in names(roster)
    assert "mark" in names(roster)
    assert roster.policy is None
    assert key_of("adam's node").public not in roster.nodes
    assert key_of("adam").public in roster.removed
    assert set(roster.invites) >= {key_of("kept").public}
    assert not {key_of("later").public, key_of("backdated").public} & set(roster.invites)


def test_the_open_invites_of_a_removed_admin_are_revoked_and_who_joined_before_stays() -> None:
    story = everyone()
    story.invite("adam", "two uses", uses=2)
    story.join("mark", "lena", "two uses")
    kept = kept_of_member(key_of("adam").public, story.said)
    story.say("olga", MemberRemoved(key_of("adam").public, kept))
    story.join("mark", "lars", "two uses")
    story.join("mark", "lisa", "two uses", lamport=len(story.said) - 3)
    roster = roster_of(story.pod, story.said)
    assert "lena" in names(roster)
    assert not {"lars", "lisa"} & names(roster)
    assert roster.invites[key_of("two uses").public].state(NOW_MS) is InviteState.REVOKED


def test_admins_cannot_remove_each_other_nor_the_owner_and_members_nobody_but_themselves() -> None:
    story = everyone()
    story.say("adam", MemberRemoved(key_of("anna").public, ()))
    story.say("adam", MemberRemoved(key_of("olga").public, ()))
    story.say("olga", MemberRemoved(key_of("olga").public, ()))
    story.say("mark", MemberRemoved(key_of("mira").public, ()))
    assert names(roster_of(story.pod, story.said)) == set(NAMES)
    story.say("mark", MemberRemoved(key_of("mark").public, ()))
    story.say("anna", MemberRemoved(key_of("gus").public, ()))
    assert names(roster_of(story.pod, story.said)) == set(NAMES) - {"mark", "gus"}


def test_a_removed_member_does_not_come_back_under_the_same_key() -> None:
    story = everyone()
    story.say("olga", MemberRemoved(key_of("mark").public, ()))
    story.invite("olga", "again")
    story.join("olga", "mark", "again")
    assert "mark" not in names(roster_of(story.pod, story.said))


def test_nobody_grants_a_role_that_is_not_below_their_own() -> None:
    story = everyone()
    story.invite("adam", "admin by admin", Role.ADMIN)
    story.invite("olga", "second owner", Role.OWNER)
    story.invite("mark", "by a member", Role.GUEST)
    story.say("adam", RoleChanged(key_of("mark").public, Role.ADMIN, ()))
    story.say("olga", RoleChanged(key_of("mira").public, Role.OWNER, ()))
    roster = roster_of(story.pod, story.said)
    assert not {key_of(w).public for w in ("admin by admin", "second owner", "by a member")} & set(
        roster.invites
    )
    assert roster.role_of(key_of("mark").public) is Role.MEMBER
    assert roster.role_of(key_of("mira").public) is Role.MEMBER
    story.say("olga", RoleChanged(key_of("mark").public, Role.ADMIN, ()))
    assert roster_of(story.pod, story.said).role_of(key_of("mark").public) is Role.ADMIN


def test_an_invite_admits_nobody_when_expired_revoked_or_used_through_a_guest() -> None:
    story = everyone()
    for word in ("expired", "revoked", "by guest"):
        story.invite("olga", word)
    story.join("mark", "late", "expired", time_ms=NOW_MS + HOUR_MS + 1)
    story.say("adam", InviteRevoked(key_of("revoked").public, ()))
    story.join("mark", "shut", "revoked")
    story.join("gus", "friend", "by guest")
    roster = roster_of(story.pod, story.said)
    assert names(roster) == set(NAMES)
    states = [roster.invites[key_of(w).public].state(NOW_MS + 2 * HOUR_MS) for w in ("expired", "revoked")]
    assert states == [InviteState.EXPIRED, InviteState.REVOKED]


def test_two_who_took_one_name_are_told_apart_everywhere() -> None:
    story = everyone()
    story.invite("olga", "a", uses=1)
    raw = story.join("mark", "mira", "a").body
    assert isinstance(raw, MemberJoined)
    story.invite("olga", "b")
    other = key_of("another mira")
    from pod.roster.events import application

    body = application(story.pod, key_of("b"), other, "mira", key_of("another node"), "mira-pc")
    story.say("olga", MemberJoined(body))
    roster = roster_of(story.pod, story.said)
    assert roster.members[other.public].name == f"mira-{other.public.hex()[:8]}"
    assert roster.nodes[key_of("another node").public].name.startswith("mira-pc-")


def test_nodes_belong_to_who_proves_to_hold_their_key_and_removed_ones_stay_out() -> None:
    story = everyone()
    node = key_of("second node")
    body = node_added(story.pod, key_of("mark").public, node, "laptop")
    with pytest.raises(EventError, match="node's signature"):
        story.say("mira", body)
    foreign = NodeAdded(node.public, "laptop", certificate(key_of("other")), body.node_signature)
    with pytest.raises(EventError, match="certificate is of another node"):
        story.say("mark", foreign)
    story.say("mark", body)
    roster = roster_of(story.pod, story.said)
    assert roster.member_of_node(node.public) == key_of("mark").public
    story.say("mira", NodeRemoved(node.public))
    assert node.public in roster_of(story.pod, story.said).nodes
    story.say("adam", NodeRemoved(node.public))
    story.say("mark", body)
    roster = roster_of(story.pod, story.said)
    assert node.public not in roster.nodes
    assert node.public in roster.removed


def test_keys_models_and_policy_follow_who_may_say_so() -> None:
    story = everyone()
    key_id = bytes(16)
    story.say("mark", KeyIssued(key_id, "laptop", 0))
    story.say("mira", KeyRevoked(key_of("mark").public, key_id))
    story.say("mark", ModelDeployed("tiny", "tiny.gguf", bytes(32), b"", 0, "auto"))
    story.say("adam", ModelDeployed("small", "small.gguf", bytes(32), b"", 3, "float32"))
    story.say("mark", PolicySet(b"no"))
    story.say("adam", PolicySet(b"yes"))
    roster = roster_of(story.pod, story.said)
    assert not roster.keys[key_of("mark").public, key_id].revoked
    assert set(roster.models) == {"small"}
    assert roster.policy == b"yes"
    story.say("adam", KeyRevoked(key_of("mark").public, key_id))
    story.say("adam", ModelRemoved("small"))
    roster = roster_of(story.pod, story.said)
    assert roster.keys[key_of("mark").public, key_id].revoked
    assert (key_of("mark").public, key_id) in roster.revoked_keys
    assert not roster.models


@pytest.mark.parametrize(
    "theft", [KeyIssued(bytes(16), "mine", 1), LimitedKeyIssued(bytes(16), "mine", 1, 1, (), 0, 0)]
)
def test_an_earlier_key_of_the_same_id_hides_no_other_members_key(
    theft: KeyIssued | LimitedKeyIssued,
) -> None:
    story = everyone()
    mark, mira, key_id = key_of("mark").public, key_of("mira").public, bytes(16)
    story.say("mark", KeyIssued(key_id, "laptop", 0))
    before = roster_of(story.pod, story.said).keys[mark, key_id]
    story.say("mira", theft, lamport=len(story.said) - 2)
    story.say("mira", KeyRevoked(mira, key_id))
    roster = roster_of(story.pod, story.said)
    assert roster.keys[mark, key_id] == before
    assert roster.keys[mira, key_id].revoked
    assert roster.revoked_keys == {(mira, key_id)}
    story.say("mark", KeyRevoked(mark, key_id))
    assert roster_of(story.pod, story.said).keys[mark, key_id] == replace(before, revoked=True)


def test_without_the_event_that_created_the_pod_there_is_no_roster() -> None:
    story = everyone()
    with pytest.raises(RosterError, match="created the pod is missing"):
        roster_of(story.pod, story.said[1:])


@pytest.mark.parametrize("position", [3, 40, 80, 120, -10])
def test_an_event_with_a_flipped_byte_is_refused(position: int) -> None:
    raw = bytearray(Story().invite("olga", "word").raw)
    raw[position] ^= 1
    with pytest.raises(EventError):
        decode_event(bytes(raw))


def test_an_event_has_one_encoding_only() -> None:
    event = Story().invite("olga", "word")
    body = {0: key_of("word").public, True: 3, 2: 1, 3: NOW_MS + HOUR_MS}
    twisted = encode(
        {0: 1, 1: event.pod, 2: event.author, 3: event.lamport, 4: NOW_MS, 5: 2, 6: body, 7: event.signature}
    )
    with pytest.raises(EventError):
        decode_event(twisted)
    with pytest.raises(EventError, match="bytes"):
        decode_event(event.raw + bytes(200_000))


def test_names_with_terminal_escapes_are_refused() -> None:
    with pytest.raises(EventError, match="unprintable"):
        Story().join("olga", "\x1b[2Jroot", "word")


def test_an_event_for_another_pod_changes_nothing() -> None:
    story = everyone()
    key = key_of("olga")
    from pod.roster.events import sign_event

    foreign = sign_event(PolicySet(b"x"), bytes(range(32)), key.public, key.sign, 50, NOW_MS)
    assert roster_of(story.pod, [*story.said, foreign]).policy is None


def test_invite_body_limits() -> None:
    with pytest.raises(EventError):
        Story().say("olga", InviteIssued(bytes(31), Role.MEMBER, 1, NOW_MS))


def test_removals_do_not_undo_the_membership_of_whom_the_remover_does_not_outrank() -> None:
    story = everyone()
    story.invite("olga", "for another admin", Role.ADMIN)
    story.join("mark", "arno", "for another admin")
    story.invite("adam", "by adam")
    story.join("mark", "pia", "by adam")
    story.say("olga", RoleChanged(key_of("pia").public, Role.ADMIN, ()))
    story.invite("olga", "for lena")
    story.join("mira", "lena", "for lena")
    story.say("mira", MemberRemoved(key_of("mira").public, ()))
    story.say("adam", MemberRemoved(key_of("mark").public, ()), lamport=len(NAMES) * 2)
    story.say("adam", InviteRevoked(key_of("by adam").public, ()))
    story.say("adam", MemberRemoved(key_of("adam").public, ()))
    assert names(roster_of(story.pod, story.said)) == {"olga", "anna", "gus", "arno", "pia", "lena"}


def test_only_who_may_remove_a_member_closes_its_invites() -> None:
    story = everyone()
    story.invite("adam", "two uses", uses=2)
    story.join("mark", "lena", "two uses")
    joined = story.said[-1].lamport
    story.say("olga", MemberRemoved(key_of("adam").public, kept_of_member(key_of("adam").public, story.said)))
    story.say("gus", MemberRemoved(key_of("adam").public, ()), lamport=joined - 1)
    assert "lena" in names(roster_of(story.pod, story.said))


def test_nobody_joins_with_a_revoked_invite_by_an_earlier_date_and_who_had_joined_stays() -> None:
    story = everyone()
    story.invite("olga", "for admins", Role.ADMIN, uses=3)
    issued = story.said[-1].lamport
    story.join("mark", "arno", "for admins")
    invite = key_of("for admins").public
    story.say("adam", InviteRevoked(invite, ()))
    assert "arno" in names(roster_of(story.pod, story.said))
    story.say("olga", InviteRevoked(invite, kept_of_invite(invite, story.said)))
    story.join("mark", "evil", "for admins", lamport=issued)
    story.join("mark", "lars", "for admins")
    roster = roster_of(story.pod, story.said)
    assert names(roster) == {*NAMES, "arno"}
    assert key_of("lars's node").public in roster.former_nodes
    assert roster.invites[invite].state(NOW_MS) is InviteState.REVOKED


def test_an_admin_that_was_demoted_gains_nothing_by_an_earlier_date() -> None:
    story = everyone()
    adam = key_of("adam").public
    story.invite("adam", "before")
    before = story.said[-1].lamport
    story.say("olga", RoleChanged(adam, Role.MEMBER, kept_of_member(adam, story.said)))
    story.invite("adam", "backdated", lamport=before)
    story.say("adam", PolicySet(b"mine"), lamport=before)
    story.say("adam", MemberRemoved(key_of("mark").public, ()), lamport=before)
    story.join("adam", "lena", "before", lamport=before + 1)
    roster = roster_of(story.pod, story.said)
    assert names(roster) == {*NAMES, "lena"}
    assert roster.policy is None
    assert key_of("backdated").public not in roster.invites


def test_who_left_by_itself_can_still_be_removed_with_what_it_backdates() -> None:
    story = everyone()
    adam = key_of("adam").public
    kept = kept_of_member(adam, story.said)
    story.say("adam", MemberRemoved(adam, kept))
    story.say("adam", PolicySet(b"mine"), lamport=5)
    assert roster_of(story.pod, story.said).policy == b"mine"
    story.say("olga", MemberRemoved(adam, kept))
    assert roster_of(story.pod, story.said).policy is None


def test_the_node_of_a_lost_join_is_known_as_a_former_one() -> None:
    story = everyone()
    story.invite("olga", "one use")
    lamport = len(story.said)
    story.join("mark", "lena", "one use", lamport)
    story.join("mira", "lars", "one use", lamport)
    roster = roster_of(story.pod, story.said)
    [lost] = roster.lost_joins
    assert roster.former_nodes[lost.node].member == lost.member
    assert lost.node not in roster.removed


def test_a_member_has_a_limited_number_of_nodes() -> None:
    story = everyone()
    for who, limit in (("mark", MAX_NUM_NODES), ("adam", MAX_NUM_ADMIN_NODES)):
        for index in range(limit + 1):
            story.say(who, node_added(story.pod, key_of(who).public, key_of(f"{who} {index}"), f"{index}"))
        assert len(roster_of(story.pod, story.said).nodes_of(key_of(who).public)) == limit


def test_a_removal_names_what_others_hang_on_first_when_there_is_too_much() -> None:
    story = everyone()
    story.invite("adam", "used")
    story.join("adam", "lena", "used")
    needed = {event.hash for event in story.said[-2:]}
    one = story.say("adam", PolicySet(b""))
    many = [replace(one, raw=index.to_bytes(4, "big"), lamport=index + 50) for index in range(MAX_NUM_KEPT)]
    kept = kept_of_member(key_of("adam").public, [*story.said, *many])
    assert len(kept) == MAX_NUM_KEPT
    assert needed <= set(kept)
    assert one.hash not in kept


def test_a_hundred_joins_and_ten_leavers_take_little_time() -> None:
    story = Story()
    for index in range(100):
        story.member(f"member {index}")
    for index in range(10):
        story.say(f"member {index}", MemberRemoved(key_of(f"member {index}").public, ()))
    roster_of(story.pod, story.said)
    started_s = time.process_time()
    assert len(roster_of(story.pod, story.said).members) == 91
    assert time.process_time() - started_s < 0.2
