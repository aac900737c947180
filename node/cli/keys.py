"""`pod key`: API keys of this member."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from node.cli import show
from node.cli.call import perform
from node.cli.options import AsJson
from node.settings import parse_duration_s

key_app = typer.Typer(help="API keys of this member, valid at every node.", no_args_is_help=True)


@key_app.command("create")
def key_create(
    name: Annotated[str, typer.Option("--name", help="What the key is for.")] = "default",
    expires: Annotated[
        str | None,
        typer.Option("--expires", help="How long it is good for: 24h, 90d (default: until revoked)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key. It is printed once, here, and works at every node of the pod."""
    result = perform(
        "key_create", {"name": name, "expires_s": parse_duration_s(expires) if expires else None}
    )
    if as_json:
        return show.print_json(result)
    show.err.print(f"Key {result['key_id']} ({name}). Shown once:")
    print(result["key"])
    return None


@key_app.command("ls")
def key_ls(as_json: AsJson = False) -> None:
    """This member's keys."""
    result: Any = perform("key_list", {})
    if as_json:
        return show.print_json(result)
    return show.table(
        ("id", "name", "created", "expires", "state"),
        [
            (
                k["key_id"],
                k["name"],
                show.time_text(k["created_ms"]),
                show.time_text(k["expires_ms"]) if k["expires_ms"] else "never",
                k["state"],
            )
            for k in result["keys"]
        ],
    )


@key_app.command("revoke")
def key_revoke(
    key: Annotated[str, typer.Argument(help="The key's id (or its name, when only one has it).")],
    as_json: AsJson = False,
) -> None:
    """Revoke a key at every node."""
    result = perform("key_revoke", {"key": key})
    return show.print_json(result) if as_json else show.out.print(f"Key {result['key_id']} is revoked.")
