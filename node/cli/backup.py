"""`pod backup` and `pod restore`: everything that is this node, in one sealed file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from node.cli import show
from node.cli.call import require_pod, this_home
from node.cli.options import AsJson, Database
from node.errors import UserError

MAX_PASSPHRASE_BYTES = 4096

PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file", metavar="FILE", help="Its first line is the passphrase (default: asked)."
    ),
]


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it; replaced if it exists.")],
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Write identity, roster and journal to a file sealed with a passphrase. The node may be running."""
    from node.backup import back_up

    home = this_home()
    require_pod(home)
    result = back_up(home, file, _passphrase(passphrase_file, is_new=True))
    if as_json:
        return show.print_json(result)
    text = (
        f"Pod {result['pod_name']}: keys, roster and {result['num_entries']} entries are in {result['file']}."
    )
    show.out.print(text, markup=False)
    return show.out.print(
        "Whoever has it and the passphrase is you. Without the passphrase it is worth nothing."
    )


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `pod backup` wrote.")],
    passphrase_file: PassphraseFile = None,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Make this machine the node of a backup. It goes on under a new node key, certified by its member."""
    from node.backup import restore as restore_backup

    result = restore_backup(this_home(), file, _passphrase(passphrase_file, is_new=False), database)
    if as_json:
        return show.print_json(result)
    text = f"Pod {result['pod_name']} restored with {result['num_entries']} entries. State: {result['home']}"
    show.out.print(text, markup=False)
    return show.out.print("Never run the old machine's node again. Next: pod up")


def _passphrase(path: Path | None, is_new: bool) -> str:
    if path is not None:
        try:
            with path.open("rb") as file:
                return file.read(MAX_PASSPHRASE_BYTES).decode().split("\n")[0].rstrip("\r")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the passphrase from {path}: {error}") from None
    if not sys.stdin.isatty():
        raise UserError("there is no terminal to ask for the passphrase; use --passphrase-file")
    return str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=is_new, err=True))
