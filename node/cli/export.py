"""`pod ledger export`: the ledger as a file for other programs, read beside the running node."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from node.cli import show
from node.cli.call import require_pod, this_home
from node.cli.options import AsJson
from node.errors import UserError
from node.private_file import written_whole
from node.settings import parse_duration_s
from pod.roster.roster import Roster

MIN_NUM_ID_CHARACTERS = 8


def ledger_export(
    format_name: Annotated[
        str | None, typer.Option("--format", metavar="csv|jsonl|beancount", help="Default: jsonl.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--since", metavar="WHEN", help="From this day on (2026-11-24, UTC), or the last 7d, 24h."
        ),
    ] = None,
    member: Annotated[
        str | None, typer.Option("--member", metavar="NAME", help="Only what this member paid or was paid.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Only requests to this model.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Default: standard output.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write every entry and what it moved as CSV, JSON lines or beancount. Amounts are exact."""
    # Loading the ledger takes half a second that other commands need not wait.
    from ledger.transactions import Transactions
    from node.beside import reading
    from node.ledger_export import FORMATS, Filters
    from node.roster_directory import RosterDirectory

    lines_of = FORMATS.get(format_name or "jsonl")
    if lines_of is None:
        raise UserError(f"--format must be one of {', '.join(FORMATS)} (got {format_name!r})")
    since_ms = parse_since(since, time.time()) if since is not None else None
    home = this_home()
    require_pod(home)
    with reading(home) as (roster, journal):
        filters = Filters(
            since_ms,
            _member_id(roster, member) if member is not None else None,
            _model_id(roster, model) if model is not None else None,
        )
        transactions = Transactions(journal, RosterDirectory(lambda: roster))
        lines = lines_of(transactions, roster, filters)
        if output is None:
            _print(lines)
            return
        num_lines = 0
        with written_whole(output) as file:
            for line in lines:
                file.write(line.encode())
                num_lines += 1
    if as_json:
        show.print_json({"file": str(output), "num_lines": num_lines})
    else:
        show.out.print(f"{num_lines} lines in {output}", markup=False)


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stdout.write(line)
    sys.stdout.flush()


def parse_since(text: str, now_s: float) -> int:
    """`2026-11-24`, `2026-11-24T10:00`, `7d` -> milliseconds since 1970. Raises UserError."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        try:
            return int(1000 * (now_s - parse_duration_s(text)))
        except UserError:
            raise UserError(f"--since must be a day such as 2026-11-24, or 24h, 7d (got {text!r})") from None
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return max(0, int(1000 * moment.timestamp()))


def _member_id(roster: Roster, text: str) -> bytes:
    """By name, also of who was removed; or by the beginning of the id."""
    known = [*roster.members.values(), *roster.former_members.values()]
    found = {one.id for one in known if one.name == text} or {
        one.id for one in known if len(text) >= MIN_NUM_ID_CHARACTERS and one.id.hex().startswith(text)
    }
    if len(found) != 1:
        raise UserError(f"no member is called {text!r}" if not found else f"{text!r} is more than one member")
    return found.pop()


def _model_id(roster: Roster, text: str) -> bytes:
    """By name; of a model that was removed, by its id."""
    for model in roster.models.values():
        if text == model.name:
            return model.id
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != 32:
        raise UserError(f"the pod has no model {text!r}")
    return found
