"""`pod treasury` and `pod transfer`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from node.amounts import credits_text, period_text, share_text
from node.cli import show
from node.cli.call import perform
from node.cli.options import AsJson

treasury_app = typer.Typer(
    help="The treasury: the policy in force, levy, grants, dividends.", invoke_without_command=True
)


@treasury_app.callback()
def treasury(context: typer.Context, as_json: AsJson = False) -> None:
    """The policy in force, what the treasury took and paid. `pod treasury set` changes it (admins)."""
    context.obj = as_json
    if context.invoked_subcommand is not None:
        return None
    result: Any = perform("treasury", {})
    return show.print_json(result) if as_json else _print_treasury(result)


def _print_treasury(result: Any) -> None:
    show.table(
        ("treasury", "credits"),
        [
            ("balance", show.credits_text(result["balance_microcredits"])),
            ("issued", show.credits_text(result["issued_microcredits"])),
            ("starter grants paid", show.credits_text(result["granted_microcredits"])),
            ("levy received", show.credits_text(result["levied_microcredits"])),
            ("dividends paid", show.credits_text(result["dividends_paid_microcredits"])),
            ("dividends due", show.credits_text(result["dividends_due_microcredits"])),
        ],
        right=frozenset({"credits"}),
    )
    show.out.print()
    _print_policy(result["policy"])
    if result["periods"]:
        show.out.print()
        show.table(
            ("period from", "to", "dividends", "members", "each", "state"),
            [
                (
                    show.time_text(period["start_ms"]),
                    show.time_text(period["end_ms"]),
                    show.credits_text(period["dividend_microcredits"]),
                    period["num_members"],
                    show.credits_text(period["per_member_microcredits"]),
                    "paid" if period["paid"] else "due after its end",
                )
                for period in result["periods"]
            ],
            right=frozenset({"dividends", "members", "each"}),
        )


def _print_policy(policy: Any) -> None:
    by = f", set by {policy['set_by']} {show.time_text(policy['set_ms'])}" if policy["set_by"] else ""
    show.table(
        ("policy", f"version {policy['name']}{by}"),
        [
            ("weights", _weights_text(policy)),
            ("starter grant", f"{credits_text(policy['starter_grant_microcredits'])} credits"),
            ("credit line", f"{credits_text(policy['credit_line_microcredits'])} credits"),
            ("levy", f"{share_text(policy['levy_per_mille'])} of what is earned"),
            (
                "dividends",
                f"{share_text(policy['dividend_per_mille'])} of the levy, "
                f"every {period_text(policy['dividend_period_s'])}",
            ),
            ("floor", f"{share_text(policy['floor_per_mille'])} of the highest weight in the queue"),
        ],
    )


def _weights_text(policy: Any) -> str:
    names = ("prompt", "cached", "output")
    return ", ".join(f"{name} {policy[f'{name}_weight_per_mille'] / 1000:g}" for name in names)


def _option(name: str, metavar: str, help: str) -> Any:
    return typer.Option(name, metavar=metavar, help=help)


@treasury_app.command("set")
def treasury_set(
    context: typer.Context,
    levy: Annotated[str | None, _option("--levy", "PERCENT", "Of what stages earn, to the treasury.")] = None,
    dividend: Annotated[
        str | None, _option("--dividend", "PERCENT", "Of the levy, to the members active in the period.")
    ] = None,
    period: Annotated[
        str | None, _option("--period", "DURATION", "How long a dividend period is: 24h, 7d.")
    ] = None,
    starter_grant: Annotated[
        str | None, _option("--starter-grant", "CREDITS", "What the treasury pays a new member.")
    ] = None,
    credit_line: Annotated[
        str | None,
        _option("--credit-line", "CREDITS", "How far below zero a member is served by a busy pod."),
    ] = None,
    floor: Annotated[
        str | None, _option("--floor", "PERCENT", "The least weight in the queue, of the highest.")
    ] = None,
    prompt_weight: Annotated[
        str | None, _option("--prompt-weight", "FACTOR", "Price of a prompt token; 1 is the plain price.")
    ] = None,
    cached_weight: Annotated[
        str | None, _option("--cached-weight", "FACTOR", "Price of a prompt token found in the cache.")
    ] = None,
    output_weight: Annotated[
        str | None, _option("--output-weight", "FACTOR", "Price of an output token.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Publish a new version of the policy; what is not named stays. For admins."""
    result: Any = perform(
        "treasury_set",
        {
            "levy": levy,
            "dividend": dividend,
            "period": period,
            "starter_grant": starter_grant,
            "credit_line": credit_line,
            "floor": floor,
            "prompt_weight": prompt_weight,
            "cached_weight": cached_weight,
            "output_weight": output_weight,
        },
    )
    if as_json or context.obj:
        return show.print_json(result)
    return _print_policy(result)


def transfer(
    member: Annotated[str, typer.Argument(metavar="MEMBER", help="Who gets it; `treasury` gives it back.")],
    amount: Annotated[str, typer.Argument(metavar="AMOUNT", help="Credits, such as 12 or 0.25.")],
    from_treasury: Annotated[
        bool, typer.Option("--from-treasury", help="The treasury's credit, not yours (the owner only).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Give credits of this machine's member to another."""
    result: Any = perform("transfer", {"member": member, "amount": amount, "from_treasury": from_treasury})
    if as_json:
        return show.print_json(result)
    amount_text = credits_text(result["amount_microcredits"])
    show.out.print(
        f"{amount_text} credits from {result['from']} to {result['to']}; "
        f"{result['from']} has {credits_text(result['balance_microcredits'])} now.",
        markup=False,
    )
    return None
