"""The pod's policies as rate cards: which is in force, which a stage still accepts, what each version says.

A policy is a rate card whose version depends on its content (`RateCard.numbered`), so admins who publish in
different partitions never give one version two meanings by accident. Junk, and what a later release can
read, is passed over. Who may set a starter grant above the first card's is the owner, as it alone may issue
credit: a card of an admin that was removed since is known for good, and must not pay out what the pod never
agreed to.
"""

from __future__ import annotations

from functools import lru_cache

from ledger.rate_card import DEFAULT_RATE_CARD, RateCard, RateCardError
from node.engine.messages import MAX_NUM_RATE_CARDS
from pod.roster.policies import Policy
from pod.roster.roster import Roster


def rate_card_of(roster: Roster) -> RateCard:
    """The one in force: new requests are priced by it."""
    card, _ = policy_in_force(roster)
    return card


def policy_in_force(roster: Roster) -> tuple[RateCard, Policy | None]:
    """The card, and who set it when; None for the card that every pod begins with."""
    for policy in reversed(roster.policies):
        card = card_in(policy, roster)
        if card is not None:
            return card, policy
    return DEFAULT_RATE_CARD, None


def recent_rate_cards(roster: Roster) -> tuple[RateCard, ...]:
    """What stages accept: the card in force, the last, and a few before it for heads that lag behind."""
    cards = [DEFAULT_RATE_CARD]
    for policy in roster.policies:
        card = card_in(policy, roster)
        if card is not None:
            cards = [*(known for known in cards if known != card), card]
    return tuple(cards[-MAX_NUM_RATE_CARDS:])


def published_rate_cards(roster: Roster) -> dict[int, tuple[RateCard, ...]]:
    """By version, all that ever were published; see `Directory.rate_cards` for those with two contents."""
    found: dict[int, set[RateCard]] = {DEFAULT_RATE_CARD.version: {DEFAULT_RATE_CARD}}
    for policy in roster.published_policies:
        card = card_in(policy, roster)
        if card is not None:
            found.setdefault(card.version, set()).add(card)
    return {version: tuple(sorted(cards, key=RateCard.encode)) for version, cards in found.items()}


def card_in(policy: Policy, roster: Roster) -> RateCard | None:
    card = _decoded(policy.content)
    if card is None or (policy.author != roster.owner.id and not may_admins_set(card)):
        return None
    return card


def may_admins_set(card: RateCard) -> bool:
    return card.starter_grant_microcredits <= DEFAULT_RATE_CARD.starter_grant_microcredits


@lru_cache(maxsize=1024)
def _decoded(content: bytes) -> RateCard | None:
    try:
        card = RateCard.decode(content)
    except RateCardError:
        return None
    return card if card.is_named_by_content else None
