"""What an operation is, and its arguments from the command line: checked before anything else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from node.errors import UserError
from node.office import Office
from pod.roster.events import Role

Result = dict[str, object]
Arguments = Mapping[str, object]
TellProgress = Callable[[Mapping[str, object]], None]
Operation = Callable[[Office, Arguments, TellProgress], Awaitable[Result]]

KEY_ID_CHARACTERS = 12


def text(arguments: Arguments, name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str) or len(value) > 4096:
        raise UserError(f"{name} is missing or no text")
    return value


def optional_text(arguments: Arguments, name: str) -> str | None:
    return None if arguments.get(name) is None else text(arguments, name)


def count(arguments: Arguments, name: str) -> int:
    value = arguments.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} must be a number above 0")
    return value


def require_admin(office: Office, action: str) -> None:
    role = office.membership.roster.role_of(office.membership.member_id)
    if role is None or role > Role.ADMIN:
        raise UserError(f"only the owner and admins may {action}; this machine's member is neither")
