"""`pod ledger`: the books as a table, and their verification."""

from __future__ import annotations

from typing import Any

import typer

from node.cli import show
from node.cli.call import perform
from node.cli.export import ledger_export
from node.cli.options import AsJson

ledger_app = typer.Typer(
    help="The books: balances, recent requests, verification.", invoke_without_command=True
)


@ledger_app.callback()
def ledger(context: typer.Context, as_json: AsJson = False) -> None:
    """Balances (they sum to 0) and recent requests. `pod ledger verify` rechecks everything."""
    context.obj = as_json
    if context.invoked_subcommand is not None:
        return None
    result: Any = perform("ledger", {})
    return show.print_json(result) if as_json else print_ledger(result)


def print_ledger(result: Any) -> None:
    show.table(
        ("account", "balance", "served tokens", "consumed tokens"),
        [
            *(
                (
                    a["name"],
                    show.credits_text(a["balance_microcredits"]),
                    a.get("num_served_tokens", ""),
                    a.get("num_consumed_tokens", ""),
                )
                for a in result["accounts"]
            ),
            ("sum", show.credits_text(result["sum_microcredits"]), "", ""),
        ],
        right=frozenset({"balance", "served tokens", "consumed tokens"}),
    )
    if result["recent"]:
        show.out.print()
        show.table(
            ("time", "member", "model", "prompt", "output", "credits", "state"),
            [
                (
                    show.time_text(r["time_ms"]),
                    r["member"],
                    r["model"],
                    r["num_prompt_tokens"],
                    r["num_output_tokens"],
                    show.credits_text(r["amount_microcredits"]),
                    r["state"],
                )
                for r in result["recent"]
            ],
            right=frozenset({"prompt", "output", "credits"}),
        )
    show.out.print(f"\n{result['num_entries']} entries, {result['num_open_holds']} open holds")


@ledger_app.command("verify")
def ledger_verify(context: typer.Context, as_json: AsJson = False) -> None:
    """Recheck every signature, chain and sum from the raw entries."""
    result: Any = perform("ledger_verify", {})
    if as_json or context.obj:
        show.print_json(result)
    elif result["ok"]:
        show.out.print(
            f"All {result['num_entries']} entries verify; the sum is {result['sum_microcredits']}."
        )
    else:
        for violation in result["violations"]:
            show.err.print(violation, markup=False)
        for name in result["frozen"]:
            show.err.print(f"frozen: {name} signed two histories", markup=False)
    if not result["ok"]:
        raise typer.Exit(1)


ledger_app.command("export")(ledger_export)
