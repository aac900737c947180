"""`pod members`: who is in the pod, and out."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from node.cli import show
from node.cli.call import perform
from node.cli.options import AsJson

members_app = typer.Typer(help="Who is in the pod.", invoke_without_command=True)


@members_app.callback()
def members(context: typer.Context, as_json: AsJson = False) -> None:
    """Who is in the pod, with balances. `pod members remove NAME` removes one."""
    context.obj = as_json
    if context.invoked_subcommand is not None:
        return None
    result: Any = perform("members", {})
    if as_json:
        return show.print_json(result)
    show.table(
        ("member", "role", "nodes", "balance", "served tokens", "consumed tokens", "joined"),
        [
            (
                m["name"],
                m["role"],
                ", ".join(m["nodes"]),
                show.credits_text(m["balance_microcredits"]),
                m["num_served_tokens"],
                m["num_consumed_tokens"],
                show.time_text(m["joined_ms"]),
            )
            for m in result["members"]
        ],
        right=frozenset({"balance", "served tokens", "consumed tokens"}),
    )
    return None


@members_app.command("remove")
def members_remove(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The member's name.")],
    as_json: AsJson = False,
) -> None:
    """Remove a member with all nodes and keys; connected nodes cut it off at once."""
    result = perform("member_remove", {"name": name})
    return show.print_json(result) if as_json or context.obj else show.out.print(f"{name} is removed.")
