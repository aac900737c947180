"""`pod key`: API keys of this node's member."""

from __future__ import annotations

from ledger.ledger import Ledger
from ledger.rate_card import MICROCREDITS_PER_CREDIT
from node.errors import UserError
from node.office import Office, check_name, wall_clock_ms
from node.operations.arguments import KEY_ID_CHARACTERS, Arguments, Result, TellProgress, text
from node.sessions.authorization import fits
from pod.api_key import (
    MAX_NUM_MODELS,
    PREFIX,
    ApiKeyError,
    announcement,
    bearer_text,
    delegate,
    parse_bearer,
)
from pod.roster.events import KeyRevoked
from pod.roster.roster import KeyRecord, Roster

MAX_CAP_CREDITS = 1_000_000_000
MAX_NUM_REQUESTS_PER_MINUTE = 6_000
MAX_NUM_TOKENS_PER_MINUTE = 1_000_000_000


async def key_create(office: Office, arguments: Arguments, _tell: TellProgress) -> Result:
    name = text(arguments, "name")
    check_name(name, "--name")
    cap = _limit(arguments, "cap", MAX_CAP_CREDITS, "whole credits")
    rpm = _limit(arguments, "rpm", MAX_NUM_REQUESTS_PER_MINUTE, "requests per minute")
    tpm = _limit(arguments, "tpm", MAX_NUM_TOKENS_PER_MINUTE, "tokens per minute")
    models = _models(arguments, office.membership.roster)
    expires_s = arguments.get("expires_s")
    membership, now_ms = office.membership, wall_clock_ms()
    expires_ms = now_ms + expires_s * 1000 if isinstance(expires_s, int) else 0
    key, delegation = delegate(
        membership.pod,
        membership.member_id,
        membership.member_key.sign,
        name,
        now_ms,
        expires_ms,
        cap * MICROCREDITS_PER_CREDIT,
        models,
        rpm,
        tpm,
    )
    if not fits(delegation):
        raise UserError("--models names too much for one key; make two keys, or one for all models")
    membership.issue(announcement(delegation))
    return {
        "key": bearer_text(key, delegation),
        "key_id": delegation.key_id.hex()[:KEY_ID_CHARACTERS],
        "name": name,
        "expires_ms": expires_ms,
        "cap_microcredits": delegation.cap_microcredits,
        "models": list(models),
        "rpm": rpm,
        "tpm": tpm,
    }


def _limit(arguments: Arguments, name: str, most: int, unit: str) -> int:
    """0 when it was not given."""
    value = arguments.get(name)
    if value is None:
        return 0
    said = str(value).strip()
    if not said.isascii() or not said.isdecimal() or len(said) > 20 or not 1 <= int(said) <= most:
        raise UserError(f"--{name} must be from 1 to {most} {unit} (got {said[:40]!r})")
    return int(said)


def _models(arguments: Arguments, roster: Roster) -> tuple[str, ...]:
    value = arguments.get("models")
    if value is None:
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in text(arguments, "models").split(",")))
    unknown = [name for name in names if name not in roster.models]
    if unknown:
        known = ", ".join(sorted(roster.models)) or "none yet"
        raise UserError(f"the pod has no model {unknown[0]!r}; it has: {known}")
    if len(names) > MAX_NUM_MODELS:
        raise UserError(f"--models names {len(names)} models; {MAX_NUM_MODELS} are the most for a key")
    return names


async def key_list(office: Office, _arguments: Arguments, _tell: TellProgress) -> Result:
    now_ms, keys = wall_clock_ms(), _own_keys(office)

    def all_spent(ledger: Ledger) -> list[int]:
        return [ledger.key_spent_microcredits(key.member, key.id) for key in keys]

    return {
        "keys": [
            {
                "key_id": key.id.hex()[:KEY_ID_CHARACTERS],
                "name": key.name,
                "created_ms": key.issued_ms,
                "expires_ms": key.expires_ms,
                "models": list(key.models),
                "cap_microcredits": key.cap_microcredits,
                "rpm": key.max_num_requests_per_minute,
                "tpm": key.max_num_tokens_per_minute,
                "spent_microcredits": spent,
                "state": _key_state(key, spent, now_ms),
            }
            for key, spent in zip(keys, await office.ledger.run(all_spent), strict=True)
        ]
    }


def _own_keys(office: Office) -> list[KeyRecord]:
    roster: Roster = office.membership.roster
    return [key for key in roster.keys.values() if key.member == office.membership.member_id]


def _key_state(key: KeyRecord, spent_microcredits: int, now_ms: int) -> str:
    if key.revoked:
        return "revoked"
    if key.expires_ms and now_ms > key.expires_ms:
        return "expired"
    return "spent" if 0 < key.cap_microcredits <= spent_microcredits else "valid"


async def key_revoke(office: Office, arguments: Arguments, _tell: TellProgress) -> Result:
    wanted, shown = _wanted(text(arguments, "key"))
    keys = [key for key in _own_keys(office) if not key.revoked]
    found = [key for key in keys if len(wanted) >= 4 and key.id.hex().startswith(wanted)]
    found = found or [key for key in keys if key.name == wanted]
    if len(found) != 1:
        how_many = "no key" if not found else f"{len(found)} keys"
        raise UserError(f"{how_many} called {shown}; `pod key ls` lists this member's keys by id")
    office.membership.issue(KeyRevoked(found[0].member, found[0].id))
    return {"key_id": found[0].id.hex()[:KEY_ID_CHARACTERS], "name": found[0].name, "revoked": True}


def _wanted(said: str) -> tuple[str, str]:
    """A name or id, and how errors may show it: people also paste the key itself, which no line repeats."""
    if not said.startswith(PREFIX):
        return said, "that" if said.startswith("sk-") else said[:80]
    try:
        wanted = parse_bearer(said)[1].key_id.hex()
    except ApiKeyError as error:
        raise UserError(f"{error}; name it by its id, which `pod key ls` shows") from None
    return wanted, wanted[:KEY_ID_CHARACTERS]
