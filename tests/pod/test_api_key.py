"""API keys: verified offline from the roster, and every refusal has its reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pod.api_key import (
    ApiKeyError,
    ApiKeyReason,
    Delegation,
    bearer_text,
    decode_delegation,
    delegate,
    parse_bearer,
    verify,
)
from pod.identity import KeyPair
from pod.roster.apply import roster_of
from pod.roster.events import KeyRevoked, MemberRemoved
from tests.pod.people import HOUR_MS, NOW_MS, Story, key_of


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
