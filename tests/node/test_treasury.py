"""`pod treasury` and `pod transfer` on a state directory: what they write, and every refusal in one line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ledger.entry import AccountOpened
from ledger.rate_card import DEFAULT_RATE_CARD
from node.amounts import credits_text, parse_credits, parse_share, parse_weight, share_text
from node.cli.main import app
from node.errors import UserError
from node.home import PodHome
from node.office import Office, create_pod, open_offline
from node.operations import run_operation
from node.policy import rate_card_of
from pod.identity import KeyPair
from pod.roster.events import InviteIssued, MemberJoined, Role, RoleChanged, application

CREDIT = 1_000_000
GRANT = DEFAULT_RATE_CARD.starter_grant_microcredits
LINE = DEFAULT_RATE_CARD.credit_line_microcredits


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    """Of olga, the owner; ben is a member without a machine of his own here."""
    home = PodHome(tmp_path / "home")
    create_pod(home, "alpha", "olga", "desk")
    opened = open_offline(home)
    invite, ben, node = KeyPair.create(), KeyPair.create(), KeyPair.create()
    opened.membership.issue(InviteIssued(invite.public, Role.MEMBER, 1, 2**47))
    opened.membership.issue(
        MemberJoined(application(opened.membership.pod, invite, ben, "ben", node, "ben-pc"))
    )
    yield opened
    opened.close()


def run(office: Office, operation: str, **arguments: object) -> dict[str, object]:
    return asyncio.run(run_operation(office, operation, arguments, lambda _: None))


def refusal(office: Office, operation: str, **arguments: object) -> str:
    before = (office.ledger.ledger.num_entries(), len(office.membership.roster.published_policies))
    with pytest.raises(UserError) as error:
        run(office, operation, **arguments)
    assert (office.ledger.ledger.num_entries(), len(office.membership.roster.published_policies)) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def give(office: Office, member: str, amount: str, from_treasury: bool = False) -> dict[str, object]:
    return run(office, "transfer", member=member, amount=amount, from_treasury=from_treasury)


def not_given(office: Office, member: str, amount: str, from_treasury: bool = False) -> str:
    return refusal(office, "transfer", member=member, amount=amount, from_treasury=from_treasury)


def balance_of(office: Office, name: str) -> int:
    member = office.membership.roster.member_named(name)
    assert member is not None
    return office.ledger.ledger.balance(member.id)


def test_a_transfer_moves_exactly_the_amount(office: Office) -> None:
    result = give(office, "ben", "0.000001")
    assert result == {
        "from": "olga",
        "to": "ben",
        "amount_microcredits": 1,
        "balance_microcredits": GRANT - 1,
    }
    assert give(office, "ben", "1,000.25")["amount_microcredits"] == 1_000_250_000
    assert balance_of(office, "ben") == 1_000_250_001
    assert office.ledger.ledger.verify() == []


def test_a_transfer_goes_down_to_the_credit_line_and_no_further(office: Office) -> None:
    assert not_given(office, "ben", "1500.000001").endswith("you have 1,000 and a credit line of 500")
    give(office, "ben", "1500")
    assert balance_of(office, "olga") == -LINE
    assert "more than you can give: you have -500" in not_given(office, "ben", "0.000001")


def test_a_new_policys_credit_line_counts_for_transfers(office: Office) -> None:
    run(office, "treasury_set", credit_line="0")
    assert not_given(office, "ben", "1000.000001").endswith("credit line of 0")
    give(office, "ben", "1000")


def test_at_most_what_was_granted_earned_and_got_from_the_treasury(office: Office) -> None:
    ledger, olga = office.ledger.ledger, office.membership.member_id
    give(office, "olga", "2000", from_treasury=True)
    give(office, "ben", "2000")
    ben = office.membership.roster.member_named("ben")
    assert ben is not None
    ledger.append(AccountOpened(ben.id, 1))
    assert ledger.transferable_microcredits(olga) == GRANT + LINE
    assert ledger.transferable_microcredits(ben.id) == GRANT + LINE
    assert ledger.balance(ben.id) == GRANT + 2_000 * CREDIT


def test_credit_from_members_is_not_given_on(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    give(office, "ben", "600")
    as_member(office, monkeypatch, Role.MEMBER)
    assert "what members gave you is yours to use" in not_given(office, "olga", "500")


@pytest.mark.parametrize(
    ("member", "amount", "line"),
    [
        ("carl", "1", "no member is called carl; `pod members` lists them"),
        ("olga", "1", "from and to are the same account"),
        ("ben", "0", "the amount must be above 0"),
        ("ben", "0.000000", "the amount must be above 0"),
        ("ben", "-1", "the amount must be credits from 0"),
        ("ben", "0.0000001", "with at most six decimals"),
        ("ben", "1e3", "the amount must be credits from 0"),
        ("ben", "nan", "the amount must be credits from 0"),
        ("ben", "", "the amount must be credits from 0"),
        ("ben", "\u0661", "the amount must be credits from 0"),
        ("ben", "1,0", "the amount must be credits from 0"),
        ("ben", "9" * 5_000, "amount is missing or no text"),
        ("ben", "9" * 30, "the amount must be credits from 0"),
    ],
)
def test_transfers_that_cannot_be(office: Office, member: str, amount: str, line: str) -> None:
    assert line in not_given(office, member, amount)


def test_the_treasurys_credit_is_the_owners_to_give(office: Office) -> None:
    assert give(office, "ben", "20", from_treasury=True)["from"] == "treasury"
    assert balance_of(office, "ben") == 20 * CREDIT
    assert "more than the treasury has" in not_given(office, "ben", "1000000", from_treasury=True)
    assert give(office, "treasury", "20")["to"] == "treasury"
    assert balance_of(office, "olga") == GRANT - 20 * CREDIT


def test_the_treasury_as_it_is_at_first(office: Office) -> None:
    found = run(office, "treasury")
    assert found["balance_microcredits"] == 1_000_000 * CREDIT - GRANT
    assert found["granted_microcredits"] == GRANT
    assert found["levied_microcredits"] == found["dividends_paid_microcredits"] == 0
    assert found["periods"] == []
    policy = found["policy"]
    assert isinstance(policy, dict)
    assert (policy["version"], policy["name"], policy["set_by"]) == (1, "1", None)
    assert policy["levy_per_mille"] == 20


def test_a_policy_changes_what_is_named_and_nothing_else(office: Office) -> None:
    run(office, "treasury_set", levy="2.5%", dividend="80", period="30d", floor="5%")
    run(office, "treasury_set", prompt_weight="0.5", cached_weight="0.05", output_weight="2.125")
    result = run(office, "treasury_set", starter_grant="1500.5", credit_line="1,000")
    assert result["set_by"] == "olga"
    assert str(result["name"]).startswith("4-")
    card = rate_card_of(office.membership.roster)
    assert (card.levy_per_mille, card.dividend_per_mille, card.floor_per_mille) == (25, 800, 50)
    assert card.dividend_period_s == 30 * 86_400
    weights = (card.prompt_weight_per_mille, card.cached_weight_per_mille, card.output_weight_per_mille)
    assert weights == (500, 50, 2_125)
    assert card.starter_grant_microcredits == 1_500_500_000
    assert card.credit_line_microcredits == 1_000 * CREDIT
    assert office.state.rate_card() == card
    # New accounts begin with it.
    ben = office.membership.roster.member_named("ben")
    assert ben is not None
    office.ledger.ledger.append(AccountOpened(ben.id, card.version))
    assert balance_of(office, "ben") == 1_500_500_000


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "say what to change"),
        ({"levy": "100.1%"}, "--levy must be from 0% to 100%, in steps of 0.1% (got '100.1%')"),
        ({"levy": "-1%"}, "--levy must be from 0%"),
        ({"levy": "0.25%"}, "in steps of 0.1%"),
        ({"levy": "2%"}, "the policy says that already"),
        ({"dividend": "101"}, "--dividend must be from 0%"),
        ({"levy": "0", "dividend": "10"}, "dividends are paid from the levy, which is 0%"),
        ({"floor": "0"}, "the floor is from 1 to 1000 per mille"),
        ({"period": "fortnight"}, "a duration must look like"),
        ({"period": "400d"}, "a dividend period is from"),
        ({"credit_line": "-5"}, "--credit-line must be credits from 0"),
        ({"starter_grant": "1e99"}, "--starter-grant must be credits from 0"),
        ({"cached_weight": "2"}, "a cached token would cost more than a new one"),
        ({"prompt_weight": "0", "cached_weight": "0", "output_weight": "0"}, "nobody would earn"),
        ({"output_weight": "0.0001"}, "--output-weight must be a factor from 0 to 1000"),
        ({"output_weight": "1001"}, "--output-weight must be a factor from 0 to 1000"),
        ({"levy": "3%", "dividend": "x"}, "--dividend must be from 0%"),
    ],
)
def test_policies_that_do_not_add_up(office: Office, changes: dict[str, object], line: str) -> None:
    assert line in refusal(office, "treasury_set", **changes)


def as_member(office: Office, monkeypatch: pytest.MonkeyPatch, role: Role) -> None:
    """This machine's member is ben from now on."""
    ben = office.membership.roster.member_named("ben")
    assert ben is not None
    office.membership.issue(RoleChanged(ben.id, role, ()))
    monkeypatch.setattr(type(office.membership), "member_id", property(lambda self: ben.id))


def test_only_admins_change_the_policy_and_only_the_owner_raises_the_grant(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_member(office, monkeypatch, Role.MEMBER)
    assert "only the owner and admins may change the policy" in refusal(office, "treasury_set", levy="3%")
    assert "only the owner may move" in not_given(office, "olga", "1", from_treasury=True)
    as_member(office, monkeypatch, Role.ADMIN)
    line = "only the owner may set a starter grant above"
    assert line in refusal(office, "treasury_set", starter_grant="1000.000001")


def test_on_the_command_line(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    office.close()
    monkeypatch.setenv("POD_HOME", str(office.home.path))
    runner = CliRunner()

    def said(*arguments: str) -> str:
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    assert json.loads(said("treasury", "set", "--levy", "5%", "--json"))["levy_per_mille"] == 50
    assert json.loads(said("treasury", "--json"))["policy"]["levy_per_mille"] == 50
    assert json.loads(said("transfer", "ben", "12.5", "--json"))["amount_microcredits"] == 12_500_000
    assert "olga has 987 now" in said("transfer", "ben", "0.5")
    assert "5% of what is earned" in said("treasury")
    for arguments, line in (
        (("transfer", "ben", "-5"), "the amount must be credits"),
        (("treasury", "set", "--levy", "150%"), "--levy must be from 0% to 100%"),
    ):
        result = runner.invoke(app, arguments)
        assert isinstance(result.exception, UserError)
        assert line in str(result.exception)


@pytest.mark.parametrize(
    ("text", "microcredits"),
    [("0", 0), ("12", 12 * CREDIT), (" 0.1 ", 100_000), ("1,234.5", 1_234_500_000), ("1.5000000", 1_500_000)],
)
def test_credits_are_read_exactly(text: str, microcredits: int) -> None:
    assert parse_credits(text, "x") == microcredits


def test_what_is_read_is_shown_the_same() -> None:
    for microcredits in (0, 1, 100_000, 999_999, CREDIT, 1_234_567_890_123):
        assert parse_credits(credits_text(microcredits), "x") == microcredits
    for per_mille in range(1_001):
        assert parse_share(share_text(per_mille), "x") == per_mille
    assert parse_weight("0.125", "x", 1_000) == 125
    assert credits_text(-1_500_000) == "-1.5"
