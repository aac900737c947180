"""`pod treasury` and `pod transfer`: the policy in force, the treasury's totals, gifts of credit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ledger.entry import TREASURY, Transferred
from ledger.ledger import Ledger
from ledger.rate_card import MAX_CARD_MICROCREDITS, MAX_NUMBER, MAX_WEIGHT_PER_MILLE, RateCard, RateCardError
from node.amounts import credits_text, parse_credits, parse_share, parse_weight
from node.books_view import member_name
from node.errors import UserError
from node.office import Office
from node.operations.arguments import Arguments, Result, TellProgress, optional_text, require_admin, text
from node.policy import may_admins_set, policy_in_force, published_rate_cards
from node.settings import parse_duration_s
from pod.roster.events import PolicySet
from pod.roster.roster import Roster

MAX_NUM_PERIODS = 12


async def treasury(office: Office, _arguments: Arguments, _tell: TellProgress) -> Result:
    totals, periods, balance = await office.ledger.run(
        lambda ledger: (ledger.treasury(), ledger.dividend_periods(), ledger.balance(TREASURY))
    )
    return {
        "policy": _policy_result(office.membership.roster),
        "balance_microcredits": balance,
        "issued_microcredits": totals.issued_microcredits,
        "granted_microcredits": totals.granted_microcredits,
        "levied_microcredits": totals.levied_microcredits,
        "dividends_paid_microcredits": totals.dividends_paid_microcredits,
        "dividends_due_microcredits": totals.dividends_due_microcredits,
        "periods": [
            {
                "start_ms": period.start_ms,
                "end_ms": period.end_ms,
                "dividend_microcredits": period.dividend_microcredits,
                "num_members": period.num_members,
                "per_member_microcredits": period.per_member_microcredits,
                "paid": period.is_paid,
            }
            for period in periods[:MAX_NUM_PERIODS]
        ],
    }


def _policy_result(roster: Roster) -> Result:
    card, policy = policy_in_force(roster)
    return {
        "version": card.version,
        "name": card.name,
        "set_by": member_name(roster, policy.author) if policy is not None else None,
        "set_ms": policy.time_ms if policy is not None else None,
        "prompt_weight_per_mille": card.prompt_weight_per_mille,
        "cached_weight_per_mille": card.cached_weight_per_mille,
        "output_weight_per_mille": card.output_weight_per_mille,
        "starter_grant_microcredits": card.starter_grant_microcredits,
        "credit_line_microcredits": card.credit_line_microcredits,
        "levy_per_mille": card.levy_per_mille,
        "dividend_per_mille": card.dividend_per_mille,
        "dividend_period_s": card.dividend_period_s,
        "floor_per_mille": card.floor_per_mille,
    }


async def treasury_set(office: Office, arguments: Arguments, _tell: TellProgress) -> Result:
    """Publish the policy in force with what is named changed."""
    roster = office.membership.roster
    current, _ = policy_in_force(roster)
    card = _changed(current, arguments)
    _check_adds_up(card, arguments)
    require_admin(office, "change the policy")
    if card == current:
        raise UserError("the policy says that already; `pod treasury` shows it")
    if office.membership.member_id != roster.owner.id and not may_admins_set(card):
        raise UserError("only the owner may set a starter grant above that of the first policy")
    highest = max(cards[0].number for cards in published_rate_cards(roster).values())
    published = card.numbered(min(highest + 1, MAX_NUMBER))
    office.membership.issue(PolicySet(published.encode()))
    result = _policy_result(office.membership.roster)
    if result["version"] != published.version:
        raise UserError("the policy was not taken: this member is no longer an admin")
    return result


Read = Callable[[str, str], int]


def _weight(said: str, option: str) -> int:
    return parse_weight(said, option, MAX_WEIGHT_PER_MILLE)


def _credits(said: str, option: str) -> int:
    return parse_credits(said, option, MAX_CARD_MICROCREDITS)


def _changed(card: RateCard, arguments: Arguments) -> RateCard:
    readers: dict[str, tuple[str, Read]] = {
        "prompt_weight": ("prompt_weight_per_mille", _weight),
        "cached_weight": ("cached_weight_per_mille", _weight),
        "output_weight": ("output_weight_per_mille", _weight),
        "starter_grant": ("starter_grant_microcredits", _credits),
        "credit_line": ("credit_line_microcredits", _credits),
        "levy": ("levy_per_mille", parse_share),
        "dividend": ("dividend_per_mille", parse_share),
        "period": ("dividend_period_s", lambda said, _: parse_duration_s(said)),
        "floor": ("floor_per_mille", parse_share),
    }
    changes: dict[str, int] = {}
    for option, (field, read) in readers.items():
        said = optional_text(arguments, option)
        if said is not None:
            changes[field] = read(said, f"--{option.replace('_', '-')}")
    if not changes:
        raise UserError("say what to change, such as `pod treasury set --levy 2%`")
    try:
        return replace(card, **changes)
    except RateCardError as error:
        raise UserError(f"this policy does not add up: {error}") from None


def _check_adds_up(card: RateCard, arguments: Arguments) -> None:
    """What each value allows by itself and all together do not."""
    if card.cached_weight_per_mille > card.prompt_weight_per_mille:
        raise UserError(
            "this policy does not add up: a cached token would cost more than a new one "
            f"(--cached-weight {card.cached_weight_per_mille / 1000:g}, "
            f"--prompt-weight {card.prompt_weight_per_mille / 1000:g})"
        )
    if card.prompt_weight_per_mille == card.output_weight_per_mille == 0:
        raise UserError("this policy does not add up: with no price for any token nobody would earn")
    if arguments.get("dividend") is not None and card.dividend_per_mille and not card.levy_per_mille:
        raise UserError("this policy does not add up: dividends are paid from the levy, which is 0%")


async def transfer(office: Office, arguments: Arguments, _tell: TellProgress) -> Result:
    amount = parse_credits(text(arguments, "amount"), "the amount")
    if amount == 0:
        raise UserError("the amount must be above 0")
    roster, sender = office.membership.roster, office.membership.member_id
    if sender not in roster.members:
        raise UserError("this machine's member is no longer in the pod")
    source = TREASURY if arguments.get("from_treasury") is True else sender
    if source == TREASURY and sender != roster.owner.id:
        raise UserError("only the owner may move the treasury's credit")
    target = _account_named(roster, text(arguments, "member"))
    if target == source:
        raise UserError("from and to are the same account")
    line = office.state.rate_card().credit_line_microcredits
    balance = await office.ledger.run(partial(_transfer, source, target, amount, line))
    office.ledger.on_append()
    return {
        "from": _account_name(roster, source),
        "to": _account_name(roster, target),
        "amount_microcredits": amount,
        "balance_microcredits": balance,
    }


def _account_named(roster: Roster, name: str) -> bytes:
    member = roster.member_named(name)
    if member is not None:
        return member.id
    if name == TREASURY.decode():
        return TREASURY
    raise UserError(f"no member is called {name[:80]}; `pod members` lists them")


def _account_name(roster: Roster, account: bytes) -> str:
    return account.decode() if account == TREASURY else member_name(roster, account)


def _transfer(
    source: bytes, target: bytes, amount_microcredits: int, line_microcredits: int, ledger: Ledger
) -> int:
    """Check and write in one go on the ledger's thread. Returns the source's balance after it."""
    available, wanted = ledger.available(source), credits_text(amount_microcredits)
    if source == TREASURY:
        if amount_microcredits > available:
            raise UserError(f"{wanted} credits are more than the treasury has: {credits_text(available)}")
    else:
        if amount_microcredits > available + line_microcredits:
            raise UserError(
                f"{wanted} credits are more than you can give: you have {credits_text(available)} "
                f"and a credit line of {credits_text(line_microcredits)}"
            )
        left = ledger.transferable_microcredits(source)
        if amount_microcredits > left:
            raise UserError(
                f"you can give away {credits_text(left)} credits more: what you were granted and earned, "
                "what the treasury gave you, and your credit line; what members gave you is yours to use"
            )
    ledger.append(Transferred(source, target, amount_microcredits))
    return ledger.balance(source)
