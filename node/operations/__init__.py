"""The operations behind the command line: data in, data out, at a running node or on its state directory.

Each checks its arguments and raises UserError with one clear line before it changes anything. What they show
comes from `pod_state` and `books_view`; how it looks is the command line's business.
"""

from __future__ import annotations

from collections.abc import Mapping

from ledger.journal import JournalError
from ledger.ledger import LedgerError
from node.errors import UserError
from node.office import Office
from node.operations import authority, keys, ledger, members, models, status, treasury
from node.operations.arguments import Arguments, Operation, Result, TellProgress
from pod.address import AddressError
from pod.membership import MembershipError
from pod.roster.apply import RosterError
from pod.roster.events import EventError

OPERATIONS: Mapping[str, Operation] = {
    "status": status.status,
    "models": status.models,
    "members": members.members,
    "member_remove": members.member_remove,
    "ledger": ledger.ledger,
    "ledger_verify": ledger.ledger_verify,
    "invite": members.invite,
    "invite_revoke": members.invite_revoke,
    "model_add": models.model_add,
    "model_remove": models.model_remove,
    "key_create": keys.key_create,
    "key_list": keys.key_list,
    "key_revoke": keys.key_revoke,
    "treasury": treasury.treasury,
    "treasury_set": treasury.treasury_set,
    "transfer": treasury.transfer,
    "leave": members.leave,
    "ca": authority.ca,
}


async def run_operation(office: Office, name: str, arguments: Arguments, tell: TellProgress) -> Result:
    """Raises UserError for anything the caller can understand and change."""
    operation = OPERATIONS.get(name)
    if operation is None:
        raise UserError(f"this node knows no operation {name!r}; is it another version?")
    try:
        return await operation(office, arguments, tell)
    except (MembershipError, EventError, RosterError, AddressError, LedgerError, JournalError) as error:
        raise UserError(str(error)) from None
