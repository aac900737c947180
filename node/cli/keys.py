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
    cap: Annotated[
        str | None,
        typer.Option("--cap", metavar="CREDITS", help="Most whole credits it may ever spend (default: all)."),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option("--models", metavar="A,B", help="The models it may use (default: all, later ones too)."),
    ] = None,
    rpm: Annotated[str | None, typer.Option("--rpm", metavar="N", help="Most requests per minute.")] = None,
    tpm: Annotated[
        str | None,
        typer.Option(
            "--tpm", metavar="N", help="Most tokens per minute, prompts and answers (default: no limit)."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key. It is printed once, here, and works at every node of the pod."""
    arguments = {"name": name, "cap": cap, "models": models, "rpm": rpm, "tpm": tpm}
    expires_s = parse_duration_s(expires) if expires is not None else None
    result = perform("key_create", {**arguments, "expires_s": expires_s})
    if as_json:
        return show.print_json(result)
    show.err.print(f"Key {result['key_id']} ({name}; {_limits_text(result)}). Shown once:", markup=False)
    print(result["key"])
    return None


def _limits_text(key: Any) -> str:
    cap, rpm, tpm = key["cap_microcredits"], key["rpm"], key["tpm"]
    limits = (
        f"{cap // 1_000_000:,} credits" if cap else "",
        f"{rpm:,}/min" if rpm else "",
        f"{tpm:,} tokens/min" if tpm else "",
    )
    return ", ".join(limit for limit in limits if limit) or "no limits"


@key_app.command("ls")
def key_ls(as_json: AsJson = False) -> None:
    """This member's keys: what they may do, what they have spent at all nodes."""
    result: Any = perform("key_list", {})
    if as_json:
        return show.print_json(result)
    return show.table(
        ("id", "name", "models", "cap", "rpm", "tpm", "spent", "expires", "state"),
        [
            (
                k["key_id"],
                k["name"],
                ", ".join(k["models"]) or "all",
                f"{k['cap_microcredits'] // 1_000_000:,}" if k["cap_microcredits"] else "-",
                f"{k['rpm']:,}" if k["rpm"] else "-",
                f"{k['tpm']:,}" if k["tpm"] else "-",
                show.credits_text(k["spent_microcredits"]),
                show.time_text(k["expires_ms"])[:10] if k["expires_ms"] else "never",
                k["state"],
            )
            for k in result["keys"]
        ],
        right=frozenset({"cap", "rpm", "tpm", "spent"}),
    )


@key_app.command("revoke")
def key_revoke(
    key: Annotated[
        str, typer.Argument(metavar="NAME|ID", help="The key's id (or its name, when only one has it).")
    ],
    as_json: AsJson = False,
) -> None:
    """Revoke a key at every node; answers that it still streams there end."""
    result = perform("key_revoke", {"key": key})
    return show.print_json(result) if as_json else show.out.print(f"Key {result['key_id']} is revoked.")
