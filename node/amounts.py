"""Credits, shares and weights as people type them, exactly: a digit too many is refused, never rounded."""

from __future__ import annotations

import re

from ledger.rate_card import MICROCREDITS_PER_CREDIT, PER_MILLE
from node.errors import UserError

MAX_TRANSFER_MICROCREDITS = 2**53
_MAX_NUM_CHARS = 40


def parse_credits(text: str, what: str, most_microcredits: int = MAX_TRANSFER_MICROCREDITS) -> int:
    """`12`, `0.000001`, `1,000.5` -> microcredits, 0 too. Raises UserError, a line that names `what`."""
    most = credits_text(most_microcredits)
    hint = (
        f"{what} must be credits from 0 to {most}, with at most six decimals (got {text[:_MAX_NUM_CHARS]!r})"
    )
    plain = text.strip()
    if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", plain, re.ASCII):
        plain = plain.replace(",", "")
    return _decimal(plain, MICROCREDITS_PER_CREDIT, most_microcredits, hint)


def parse_share(text: str, what: str) -> int:
    """`2%`, `2.5%`, `2.5` -> per mille."""
    hint = f"{what} must be from 0% to 100%, in steps of 0.1% (got {text[:_MAX_NUM_CHARS]!r})"
    return _decimal(text.strip().removesuffix("%").rstrip(), 10, PER_MILLE, hint)


def parse_weight(text: str, what: str, most_per_mille: int) -> int:
    """`1`, `0.1` -> per mille."""
    hint = (
        f"{what} must be a factor from 0 to {most_per_mille // PER_MILLE}, with at most three decimals "
        f"(got {text[:_MAX_NUM_CHARS]!r})"
    )
    return _decimal(text.strip(), PER_MILLE, most_per_mille, hint)


def credits_text(microcredits: int) -> str:
    """Exact, without zeros at the end: `1,000.5`."""
    whole, rest = divmod(abs(microcredits), MICROCREDITS_PER_CREDIT)
    digits = f".{rest:06}".rstrip("0") if rest else ""
    return f"{'-' if microcredits < 0 else ''}{whole:,}{digits}"


def share_text(per_mille: int) -> str:
    whole, rest = divmod(per_mille, 10)
    return f"{whole}.{rest}%" if rest else f"{whole}%"


def period_text(period_s: int) -> str:
    """`7d`, `36h`, `90s`: as `parse_duration_s` reads it."""
    for unit, size_s in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if period_s % size_s == 0:
            return f"{period_s // size_s}{unit}"
    return f"{period_s}s"


def _decimal(text: str, unit: int, most: int, hint: str) -> int:
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?", text, re.ASCII)
    if match is None or len(text) > _MAX_NUM_CHARS:
        raise UserError(hint)
    digits = match[2] or ""
    base: int = 10 ** len(digits)
    value, rest = divmod(int(match[1] + digits) * unit, base)
    if rest or value > most:
        raise UserError(hint)
    return value
