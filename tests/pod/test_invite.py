"""Invites as text: everything inside, and every way of being no good has its own reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pod import base58
from pod.canonical import encode_record
from pod.invite import PREFIX, Invite, InviteError, _checksum, parse, signed_invite, unsigned_invite
from pod.roster.events import Role
from tests.pod.people import HOUR_MS, NOW_MS, key_of


def an_invite() -> Invite:
    olga = key_of("olga")
    addresses = ("/ip4/192.0.2.7/tcp/4001/p2p/12D3KooWExample",)
    unsigned = unsigned_invite(bytes(32), "alpha", addresses, Role.MEMBER, NOW_MS + HOUR_MS, 1, olga.public)
    return signed_invite(unsigned, olga.sign)


def resealed(invite: Invite) -> str:
    """Text with a good checksum, as somebody who tampers would make it."""
    raw = encode_record(invite)
    return PREFIX + base58.encode(raw + _checksum(raw))


def test_the_text_carries_everything_and_survives_a_terminals_line_breaks() -> None:
    invite = an_invite()
    text = invite.text()
    assert parse(text, NOW_MS) == invite
    assert parse(f" {text[:60]}\n  {text[60:]}\n", NOW_MS) == invite
    assert invite.key.public not in invite.seed
    assert invite.seed.hex() not in repr(invite)


@settings(max_examples=40, deadline=None)
@given(st.integers(len(PREFIX), len(an_invite().text()) - 1), st.sampled_from(base58.ALPHABET))
def test_a_changed_character_is_noticed(position: int, character: str) -> None:
    text = an_invite().text()
    changed = text[:position] + character + text[position + 1 :]
    if changed != text:
        with pytest.raises(InviteError, match="damaged"):
            parse(changed, NOW_MS)


@pytest.mark.parametrize("text", ["", "hello", PREFIX, PREFIX + "0", PREFIX + "a" * 20_000])
def test_other_text_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InviteError) as refusal:
        parse(text, NOW_MS)
    assert "\n" not in str(refusal.value)


def test_a_cut_off_invite_is_damaged() -> None:
    with pytest.raises(InviteError, match="damaged"):
        parse(an_invite().text()[:-5], NOW_MS)


def test_whoever_changes_role_expiry_uses_or_address_is_found_out() -> None:
    invite = an_invite()
    for changed in (
        replace(invite, role=Role.ADMIN),
        replace(invite, expires_ms=invite.expires_ms + 1),
        replace(invite, max_num_uses=9),
        replace(invite, addresses=("/ip4/203.0.113.1/tcp/1",)),
        replace(invite, issued_by=key_of("mallory").public),
    ):
        with pytest.raises(InviteError, match="tampered"):
            parse(resealed(changed), NOW_MS)


def test_an_expired_invite_says_so() -> None:
    with pytest.raises(InviteError, match="expired"):
        parse(an_invite().text(), NOW_MS + HOUR_MS + 1)
