"""API keys: verified offline from the roster, and every refusal has its reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pod import base58
from pod.api_key import (
    MAX_CLOCK_SKEW_MS,
    PREFIX,
    ApiKeyError,
    ApiKeyReason,
    Delegation,
    bearer_text,
    decode_delegation,
    delegate,
    parse_bearer,
    verify,
)
from pod.canonical import encode, pack
from pod.identity import KeyPair
from pod.roster.apply import roster_of
from pod.roster.events import KeyRevoked, LimitedKeyIssued, MemberRemoved
from tests.pod.people import HOUR_MS, NOW_MS, Story, key_of

GOLDEN = Path(__file__).parent / "golden"


def a_key(story: Story, who: str = "mark", expires_ms: int = 0) -> tuple[KeyPair, Delegation]:
    key = key_of(who)
    return delegate(story.pod, key.public, key.sign, "laptop", NOW_MS, expires_ms, 5, ("small",))


def reason(delegation: Delegation, story: Story, now_ms: int = NOW_MS) -> ApiKeyReason:
    with pytest.raises(ApiKeyError) as refusal:
        verify(delegation, roster_of(story.pod, story.said), now_ms)
    return refusal.value.reason


def test_a_key_of_a_member_is_good_at_any_node_that_holds_the_roster() -> None:
    story = Story()
    story.member("mark")
    text = bearer_text(*a_key(story))
    key, delegation = parse_bearer(text)
    assert text.startswith("sk-pod-")
    assert delegation.key_public == key.public
    assert len(delegation.key_id) == 16
    assert decode_delegation(delegation.encode()) == delegation
    verify(delegation, roster_of(story.pod, story.said), NOW_MS)


def test_every_reason_to_refuse() -> None:
    story = Story()
    story.member("mark")
    _, delegation = a_key(story, expires_ms=NOW_MS + HOUR_MS)
    assert reason(delegation, story, NOW_MS + HOUR_MS + 1) is ApiKeyReason.EXPIRED
    assert reason(a_key(story, "stranger")[1], story) is ApiKeyReason.UNKNOWN_MEMBER
    other = delegate(bytes(32), key_of("mark").public, key_of("mark").sign, "x", NOW_MS)[1]
    assert reason(other, story) is ApiKeyReason.NOT_THIS_POD
    story.say("mark", KeyRevoked(key_of("mark").public, delegation.key_id))
    assert reason(delegation, story) is ApiKeyReason.REVOKED
    story.say("olga", MemberRemoved(key_of("mark").public, ()))
    assert reason(delegation, story) is ApiKeyReason.UNKNOWN_MEMBER


def test_a_delegation_its_member_did_not_sign_is_malformed() -> None:
    story = Story()
    key, delegation = a_key(story)
    for forged in (
        replace(delegation, cap_microcredits=10**12),
        replace(delegation, member=key_of("olga").public),
        replace(delegation, version=2),
    ):
        with pytest.raises(ApiKeyError) as refusal:
            parse_bearer(bearer_text(key, forged))
        assert refusal.value.reason is ApiKeyReason.MALFORMED
    with pytest.raises(ApiKeyError):
        parse_bearer(bearer_text(key_of("another secret"), delegation))


@pytest.mark.parametrize(
    "text", ["", "sk-abc", "sk-pod-", "sk-pod-0", "sk-pod-" + "2" * 50, "sk-pod-" + "z" * 9000]
)
def test_other_text_is_malformed(text: str) -> None:
    with pytest.raises(ApiKeyError) as refusal:
        parse_bearer(text)
    assert refusal.value.reason is ApiKeyReason.MALFORMED


@pytest.mark.parametrize(("version", "requests", "tokens"), [(1, 0, 0), (2, 30, 20_000)])
def test_keys_in_people_s_hands_stay_readable(version: int, requests: int, tokens: int) -> None:
    """The golden files are never edited: version 1 was written before there were limits per minute."""
    text, delegation_hex = (GOLDEN / f"api_key_v{version}.txt").read_text().split()
    key, delegation = parse_bearer(text)
    assert delegation.encode().hex() == delegation_hex
    assert bearer_text(key, delegation) == text
    assert delegation == replace(
        delegation,
        version=version,
        pod=b"P" * 32,
        member=key_of("golden member").public,
        key_public=key_of("golden key").public,
        name="laptop",
        created_ms=1_700_000_000_000,
        expires_ms=1_800_000_000_000,
        cap_microcredits=5_000_000,
        models=("small", "org/large"),
        max_num_requests_per_minute=requests,
        max_num_tokens_per_minute=tokens,
    )
    raw = bytes.fromhex(delegation_hex)
    for place in range(len(raw)):
        with pytest.raises(ApiKeyError):
            decode_delegation(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])


def test_only_keys_with_limits_per_minute_are_of_the_new_version() -> None:
    mark = key_of("mark")
    made = [delegate(bytes(32), mark.public, mark.sign, "x", 1, 0, 5, (), *rest)[1] for rest in ((), (0, 7))]
    assert [delegation.version for delegation in made] == [1, 2]
    assert [decode_delegation(delegation.encode()) for delegation in made] == made


def test_no_field_can_be_dropped_added_or_given_another_version() -> None:
    mark = key_of("mark")
    _, delegation = delegate(bytes(32), mark.public, mark.sign, "x", 1, 0, 5, (), 3, 4)
    fields = pack(delegation)
    for changed in (
        {**fields, 0: 1},
        {**fields, 0: 3},
        {**fields, 0: True},
        {**fields, 12: 0},
        {number: value for number, value in fields.items() if number != 10},
        {number + 1: value for number, value in fields.items()},
        {**fields, 9: -1},
        {**fields, 9: 1.5},
        {},
        [],
    ):
        with pytest.raises(ApiKeyError) as refusal:
            decode_delegation(encode(changed))
        assert refusal.value.reason is ApiKeyReason.MALFORMED


def test_a_key_cut_short_or_with_a_wrong_letter_is_malformed() -> None:
    text = (GOLDEN / "api_key_v2.txt").read_text().split()[0]
    for damaged in (text[:-1], text[: len(text) // 2], text + "1", text[:30] + "0" + text[31:], text * 2):
        with pytest.raises(ApiKeyError) as refusal:
            parse_bearer(damaged)
        assert refusal.value.reason is ApiKeyReason.MALFORMED
    raw = base58.decode(text.removeprefix(PREFIX))
    with pytest.raises(ApiKeyError):
        parse_bearer(PREFIX + base58.encode(bytes(32) + raw[32:]))


def test_a_key_dated_beyond_what_clocks_differ_is_refused() -> None:
    story = Story()
    story.member("mark")
    _, delegation = a_key(story)
    roster = roster_of(story.pod, story.said)
    verify(delegation, roster, NOW_MS - MAX_CLOCK_SKEW_MS)
    assert reason(delegation, story, NOW_MS - MAX_CLOCK_SKEW_MS - 1) is ApiKeyReason.FUTURE


def test_the_roster_says_what_a_key_is_limited_to_and_nothing_that_opens_anything() -> None:
    story = Story()
    story.member("mark")
    key_id = b"i" * 16
    story.say("mark", LimitedKeyIssued(key_id, "laptop", 0, 5_000_000, ("small",), 30, 20_000))
    place = (key_of("mark").public, key_id)
    record = roster_of(story.pod, story.said).keys[place]
    assert (record.name, record.cap_microcredits, record.models) == ("laptop", 5_000_000, ("small",))
    assert (record.max_num_requests_per_minute, record.max_num_tokens_per_minute) == (30, 20_000)
    story.say("mark", KeyRevoked(key_of("mark").public, key_id))
    assert roster_of(story.pod, story.said).keys[place] == replace(record, revoked=True)
