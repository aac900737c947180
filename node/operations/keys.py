"""`pod key`: API keys of this node's member."""

from __future__ import annotations

from node.errors import UserError
from node.office import Office, check_name, wall_clock_ms
from node.operations.arguments import KEY_ID_CHARACTERS, Arguments, Result, TellProgress, text
from pod.api_key import bearer_text, delegate
from pod.roster.events import KeyIssued, KeyRevoked
from pod.roster.roster import KeyRecord, Roster


async def key_create(office: Office, arguments: Arguments, _tell: TellProgress) -> Result:
    name, expires_s = text(arguments, "name"), arguments.get("expires_s")
    check_name(name, "--name")
    membership, now_ms = office.membership, wall_clock_ms()
    expires_ms = now_ms + expires_s * 1000 if isinstance(expires_s, int) else 0
    key, delegation = delegate(
        membership.roster.pod, membership.member_id, membership.member_key.sign, name, now_ms, expires_ms
    )
    membership.issue(KeyIssued(delegation.key_id, name, expires_ms))
    return {
        "key": bearer_text(key, delegation),
        "key_id": delegation.key_id.hex()[:KEY_ID_CHARACTERS],
        "name": name,
        "expires_ms": expires_ms,
    }


async def key_list(office: Office, _arguments: Arguments, _tell: TellProgress) -> Result:
    now_ms = wall_clock_ms()
    return {
        "keys": [
            {
                "key_id": key.id.hex()[:KEY_ID_CHARACTERS],
                "name": key.name,
                "created_ms": key.issued_ms,
                "expires_ms": key.expires_ms,
                "state": _key_state(key, now_ms),
            }
            for key in _own_keys(office)
        ]
    }


def _own_keys(office: Office) -> list[KeyRecord]:
    roster: Roster = office.membership.roster
    return [key for key in roster.keys.values() if key.member == office.membership.member_id]


def _key_state(key: KeyRecord, now_ms: int) -> str:
    if key.revoked:
        return "revoked"
    return "expired" if key.expires_ms and now_ms > key.expires_ms else "valid"


async def key_revoke(office: Office, arguments: Arguments, _tell: TellProgress) -> Result:
    wanted = text(arguments, "key")
    keys = [key for key in _own_keys(office) if not key.revoked]
    found = [key for key in keys if len(wanted) >= 4 and key.id.hex().startswith(wanted)]
    found = found or [key for key in keys if key.name == wanted]
    if len(found) != 1:
        how_many = "no key" if not found else f"{len(found)} keys"
        raise UserError(f"{how_many} called {wanted}; `pod key ls` lists this member's keys by id")
    office.membership.issue(KeyRevoked(found[0].member, found[0].id))
    return {"key_id": found[0].id.hex()[:KEY_ID_CHARACTERS], "name": found[0].name, "revoked": True}
