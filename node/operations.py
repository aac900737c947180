"""The operations behind the command line: data in, data out, at a running node or on its state directory.

Each checks its arguments and raises UserError with one clear line before it changes anything. What they show
comes from `pod_state` and `books_view`; how it looks is the command line's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from ledger.journal import JournalError
from ledger.ledger import LedgerError
from node.books_view import (
    AccountRow,
    account_rows,
    member_name,
    model_name,
    node_name,
    session_route_text,
    sum_microcredits,
)
from node.catalogue import Entry
from node.errors import UserError
from node.models.manifest import Manifest
from node.models.package import build_package
from node.models.quantization import DTYPES
from node.office import Office, check_name, wall_clock_ms
from node.settings import check_host, split_address
from node.time_view import request_rows, time_per_token
from pod.address import AddressError
from pod.api_key import bearer_text, delegate
from pod.membership import MembershipError
from pod.roster.apply import RosterError
from pod.roster.events import (
    EventError,
    KeyIssued,
    KeyRevoked,
    ModelDeployed,
    ModelRemoved,
    Role,
)
from pod.roster.roster import KeyRecord, Model, Roster

Result = dict[str, object]
Arguments = Mapping[str, object]
TellProgress = Callable[[Mapping[str, object]], None]
Operation = Callable[[Office, Arguments, TellProgress], Awaitable[Result]]

MAX_NUM_RECENT = 30
KEY_ID_CHARACTERS = 12


async def run_operation(office: Office, name: str, arguments: Arguments, tell: TellProgress) -> Result:
    """Raises UserError for anything the caller can understand and change."""
    operation = OPERATIONS.get(name)
    if operation is None:
        raise UserError(f"this node knows no operation {name!r}; is it another version?")
    try:
        return await operation(office, arguments, tell)
    except (MembershipError, EventError, RosterError, AddressError, LedgerError, JournalError) as error:
        raise UserError(str(error)) from None


# Reading


async def status(office: Office, _arguments: Arguments, _tell: TellProgress) -> Result:
    roster, state = office.membership.roster, office.state
    statuses, live = state.statuses(), state.live() if office.running else frozenset()
    nodes = []
    for node in sorted(roster.nodes.values(), key=lambda n: n.name):
        known = statuses.get(node.id)
        nodes.append(
            {
                "id": node.id.hex(),
                "name": node.name,
                "member": member_name(roster, node.member),
                "live": node.id in live,
                "device": known.device if known else "",
                "data_address": known.data_address if known else "",
                "memory_bytes": known.memory_bytes if known else 0,
                "note": state.note_of(node.id),
                "shards": [
                    {
                        "model": model_name(roster, shard.model),
                        "start_layer": shard.start_layer,
                        "end_layer": shard.end_layer,
                        "ready": shard.ready,
                        "percent": shard.loaded_per_mille // 10,
                    }
                    for shard in (known.shards if known else ())
                ],
            }
        )
    own = office.membership.node_id
    return {
        "pod": {"id": roster.pod.hex(), "name": roster.name},
        "node": {
            "id": own.hex(),
            "name": node_name(roster, own),
            "member": member_name(roster, office.membership.member_id),
            "running": office.running is not None,
            "is_in_pod": own in roster.nodes,
            "api_url": office.running.api_url if office.running else "",
            "home": str(office.home.path),
        },
        "nodes": nodes,
        "models": _model_rows(office),
        "loading": list(office.loading()),
        "recent_requests": request_rows(office.state),
    }


def _model_rows(office: Office) -> list[Result]:
    rows: list[Result] = []
    state = office.state
    for entry in office.catalogue.entries():
        condition = state.condition_of(entry)
        rows.append(
            {
                "name": entry.deployed.name,
                "reference": entry.deployed.reference,
                "id": entry.deployed.id.hex(),
                "num_layers": entry.manifest.num_layers,
                "max_context_tokens": entry.manifest.max_context_tokens,
                "dtype": entry.manifest.dtype,
                "weight_type": entry.manifest.weight_type,
                "num_weight_bytes": entry.manifest.stage_bytes(0, entry.manifest.num_layers),
                "split": entry.deployed.num_stages,
                "state": condition.state if office.running else "node not running",
                "reason": condition.reason,
                "loaded_percent": condition.loaded_per_mille // 10,
                "tokens_per_s": state.tokens_per_s(entry.deployed.id),
                "predicted_tokens_per_s": state.predicted_tokens_per_s(entry.deployed.id, condition.route),
                "time_per_token": time_per_token(state, entry.deployed.id),
                "num_stages": len(condition.route),
                "route": state.route_text(condition.route),
            }
        )
    return rows


async def models(office: Office, _arguments: Arguments, _tell: TellProgress) -> Result:
    return {"models": _model_rows(office)}


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
                **_account(rows[member.id]),
            }
            for member in sorted(roster.members.values(), key=lambda m: (m.joined_ms, m.name))
        ]
    }


def _account(row: AccountRow) -> Result:
    return {
        "balance_microcredits": row.balance_microcredits,
        "num_served_tokens": row.num_served_tokens,
        "num_consumed_tokens": row.num_consumed_tokens,
        "earned_microcredits": row.totals.microcredits_earned,
        "spent_microcredits": row.totals.microcredits_spent,
    }


async def ledger(office: Office, _arguments: Arguments, _tell: TellProgress) -> Result:
    roster = office.membership.roster
    rows = await office.ledger.run(lambda books: account_rows(books, roster))
    books = office.ledger.ledger
    return {
        "accounts": [{"name": row.name, "role": row.role, **_account(row)} for row in rows],
        "sum_microcredits": sum_microcredits(rows),
        "num_entries": books.num_entries(),
        "num_open_holds": len(books.open_holds()),
        "digest": books.digest().hex(),
        "recent": [
            {
                "session": summary.session.hex(),
                "time_ms": summary.opened_ms or 0,
                "member": member_name(roster, summary.payer),
                "model": model_name(roster, summary.model),
                "route": session_route_text(roster, summary),
                "num_prompt_tokens": summary.num_prompt_tokens,
                "num_output_tokens": summary.num_output_tokens,
                "amount_microcredits": summary.amount_microcredits,
                "state": summary.state.value,
            }
            for summary in books.recent_sessions(MAX_NUM_RECENT)
        ],
    }


async def ledger_verify(office: Office, _arguments: Arguments, _tell: TellProgress) -> Result:
    books = office.ledger.ledger
    violations = await asyncio.to_thread(books.verify)
    total = sum(books.balances().values())
    return {
        "ok": not violations and total == 0,
        "num_entries": books.num_entries(),
        "sum_microcredits": total,
        "violations": [str(violation) for violation in violations],
    }


# Members and invites


async def invite(office: Office, arguments: Arguments, _tell: TellProgress) -> Result:
    role = _role(_text(arguments, "role"))
    _require_admin(office, "invite")
    host = _optional_text(arguments, "advertise_host")
    if host is not None:
        check_host(host, "--advertise")
    addresses = office.invite_addresses(
        split_address(_text(arguments, "listen_address"), "--listen"),
        host,
    )
    made = office.membership.invite(
        role, _count(arguments, "uses"), _count(arguments, "expires_s"), addresses
    )
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


def _require_admin(office: Office, action: str) -> None:
    role = office.membership.roster.role_of(office.membership.member_id)
    if role is None or role > Role.ADMIN:
        raise UserError(f"only the owner and admins may {action}; this machine's member is neither")


async def invite_revoke(office: Office, arguments: Arguments, _tell: TellProgress) -> Result:
    wanted = _text(arguments, "invite_id")
    _require_admin(office, "revoke invites")
    found = [one for one in office.membership.roster.invites.values() if one.id.hex().startswith(wanted)]
    if len(found) != 1 or len(wanted) < 4:
        raise UserError(f"no invite has the id {wanted}")
    office.membership.revoke_invite(found[0].id)
    return {"invite_id": wanted, "revoked": True}


async def member_remove(office: Office, arguments: Arguments, _tell: TellProgress) -> Result:
    name = _text(arguments, "name")
    roster = office.membership.roster
    found = roster.member_named(name)
    if found is None:
        raise UserError(f"no member is called {name}; `pod members` lists them")
    if found.role is Role.OWNER:
        raise UserError(f"{name} owns the pod and cannot be removed")
    if found.id != office.membership.member_id:
        _require_admin(office, "remove members")
        own_role = roster.role_of(office.membership.member_id)
        if own_role is None or own_role >= found.role:
            raise UserError(f"only the owner may remove {name}, who is an admin too")
    office.membership.remove_member(found.id)
    return {"name": name, "removed": True}


# Models


async def model_add(office: Office, arguments: Arguments, tell: TellProgress) -> Result:
    ref, dtype = _text(arguments, "ref"), _text(arguments, "dtype")
    split, name = arguments.get("split"), _optional_text(arguments, "name")
    if name is not None:
        check_name(name, "--name")
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)} (got {dtype!r})")
    _require_admin(office, "choose models")
    loop = asyncio.get_running_loop()

    def progress(what: str, done_bytes: int, total_bytes: int) -> None:
        told = {"what": what, "done_bytes": done_bytes, "total_bytes": total_bytes}
        loop.call_soon_threadsafe(tell, told)

    package = await asyncio.to_thread(build_package, ref, dtype, office.home.models_dir, progress)
    manifest = package.manifest
    if isinstance(split, int) and split > manifest.num_layers:
        raise UserError(f"{ref} has {manifest.num_layers} layers and cannot be split {split} ways")
    deployed = ModelDeployed(
        name=name or manifest.name,
        reference=ref,
        model=manifest.model_id,
        manifest=manifest.encode(),
        num_stages=split if isinstance(split, int) else 0,
        dtype=dtype,
    )
    _check_deployable(office, deployed, manifest)
    office.membership.issue(deployed)
    return {
        "name": deployed.name,
        "id": manifest.model_id.hex(),
        "num_layers": manifest.num_layers,
        "num_parameters": manifest.stage_num_parameters(0, manifest.num_layers),
        "weight_type": manifest.weight_type,
        "split": deployed.num_stages,
    }


def _check_deployable(office: Office, deployed: ModelDeployed, manifest: Manifest) -> None:
    """One name per model; and while nodes serve, it must fit what they have together."""
    for known in office.membership.roster.models.values():
        if known.id == deployed.model and known.name != deployed.name:
            raise UserError(f"the pod serves this model already, as {known.name}")
    model = Model(
        deployed.name,
        deployed.reference,
        deployed.model,
        deployed.manifest,
        deployed.num_stages,
        deployed.dtype,
    )
    num_missing_bytes = office.state.num_missing_bytes(Entry(model, manifest))
    if num_missing_bytes:
        raise UserError(
            f"{deployed.name} is larger than the pod: the nodes that serve now lack "
            f"{num_missing_bytes / 2**30:.2f} GiB of memory"
        )


async def model_remove(office: Office, arguments: Arguments, _tell: TellProgress) -> Result:
    name = _text(arguments, "name")
    if name not in office.membership.roster.models:
        raise UserError(f"the pod serves no model called {name}; `pod models` lists them")
    _require_admin(office, "remove models")
    office.membership.issue(ModelRemoved(name))
    return {"name": name, "removed": True}


# Keys


async def key_create(office: Office, arguments: Arguments, _tell: TellProgress) -> Result:
    name, expires_s = _text(arguments, "name"), arguments.get("expires_s")
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
    wanted = _text(arguments, "key")
    keys = [key for key in _own_keys(office) if not key.revoked]
    found = [key for key in keys if len(wanted) >= 4 and key.id.hex().startswith(wanted)]
    found = found or [key for key in keys if key.name == wanted]
    if len(found) != 1:
        how_many = "no key" if not found else f"{len(found)} keys"
        raise UserError(f"{how_many} called {wanted}; `pod key ls` lists this member's keys by id")
    office.membership.issue(KeyRevoked(found[0].member, found[0].id))
    return {"key_id": found[0].id.hex()[:KEY_ID_CHARACTERS], "name": found[0].name, "revoked": True}


# Leaving


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


def _text(arguments: Arguments, name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str) or len(value) > 4096:
        raise UserError(f"{name} is missing or no text")
    return value


def _optional_text(arguments: Arguments, name: str) -> str | None:
    return None if arguments.get(name) is None else _text(arguments, name)


def _count(arguments: Arguments, name: str) -> int:
    value = arguments.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} must be a number above 0")
    return value


OPERATIONS: Mapping[str, Operation] = {
    "status": status,
    "models": models,
    "members": members,
    "member_remove": member_remove,
    "ledger": ledger,
    "ledger_verify": ledger_verify,
    "invite": invite,
    "invite_revoke": invite_revoke,
    "model_add": model_add,
    "model_remove": model_remove,
    "key_create": key_create,
    "key_list": key_list,
    "key_revoke": key_revoke,
    "leave": leave,
}
