"""`pod members` and `pod invite`: who is in the pod, who may come in, who leaves."""

from __future__ import annotations

from node.books_view import account_rows
from node.errors import UserError
from node.office import Office
from node.operations.arguments import (
    KEY_ID_CHARACTERS,
    Arguments,
    Result,
    TellProgress,
    count,
    optional_text,
    require_admin,
    text,
)
from node.operations.ledger import account_result
from node.settings import check_host, split_address
from pod.roster.events import Role


async def members(office: Office, _arguments: Arguments, _tell: TellProgress) -> Result:
    roster = office.membership.roster
    rows = {row.account: row for row in await office.ledger.run(lambda ledger: account_rows(ledger, roster))}
    return {
        "members": [
            {
                "id": member.id.hex(),
                "name": member.name,
                "role": member.role.name.lower(),
                "joined_ms": member.joined_ms,
                "nodes": [node.name for node in roster.nodes_of(member.id)],
                **account_result(rows[member.id]),
            }
            for member in sorted(roster.members.values(), key=lambda m: (m.joined_ms, m.name))
        ]
    }


async def invite(office: Office, arguments: Arguments, _tell: TellProgress) -> Result:
    role = _role(text(arguments, "role"))
    require_admin(office, "invite")
    host = optional_text(arguments, "advertise_host")
    if host is not None:
        check_host(host, "--advertise")
    addresses = office.invite_addresses(
        split_address(text(arguments, "listen_address"), "--listen"),
        host,
    )
    made = office.membership.invite(role, count(arguments, "uses"), count(arguments, "expires_s"), addresses)
    return {
        "invite": made.text(),
        "invite_id": made.key.public.hex()[:KEY_ID_CHARACTERS],
        "role": role.name.lower(),
        "uses": made.max_num_uses,
        "expires_ms": made.expires_ms,
        "addresses": list(made.addresses),
    }


def _role(text: str) -> Role:
    allowed = {role.name.lower(): role for role in (Role.ADMIN, Role.MEMBER, Role.GUEST)}
    if text not in allowed:
        raise UserError(f"--role must be one of {', '.join(allowed)} (got {text!r})")
    return allowed[text]


async def invite_revoke(office: Office, arguments: Arguments, _tell: TellProgress) -> Result:
    wanted = text(arguments, "invite_id")
    require_admin(office, "revoke invites")
    found = [one for one in office.membership.roster.invites.values() if one.id.hex().startswith(wanted)]
    if len(found) != 1 or len(wanted) < 4:
        raise UserError(f"no invite has the id {wanted}")
    office.membership.revoke_invite(found[0].id)
    return {"invite_id": wanted, "revoked": True}


async def member_remove(office: Office, arguments: Arguments, _tell: TellProgress) -> Result:
    name = text(arguments, "name")
    roster = office.membership.roster
    found = roster.member_named(name)
    if found is None:
        raise UserError(f"no member is called {name}; `pod members` lists them")
    if found.role is Role.OWNER:
        raise UserError(f"{name} owns the pod and cannot be removed")
    if found.id != office.membership.member_id:
        require_admin(office, "remove members")
        own_role = roster.role_of(office.membership.member_id)
        if own_role is None or own_role >= found.role:
            raise UserError(f"only the owner may remove {name}, who is an admin too")
    office.membership.remove_member(found.id)
    return {"name": name, "removed": True}


async def leave(office: Office, _arguments: Arguments, _tell: TellProgress) -> Result:
    roster, member = office.membership.roster, office.membership.member_id
    num_others = len(roster.members) - 1
    if office.running is not None and num_others and not office.membership.live():
        raise UserError("no other node is reachable to hear that this one leaves; try again when one is")
    if roster.owner.id == member and num_others:
        raise UserError(f"the owner cannot leave while {num_others} other members are in the pod")
    if office.leave is not None:
        kept = await office.leave()
    elif member in roster.members and num_others:
        raise UserError("run the node first (`pod up`), so that the others hear that it leaves")
    else:
        kept = office.home.set_aside()
    return {"pod_name": roster.name, "kept": str(kept)}
