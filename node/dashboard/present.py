"""Numbers and times as people read them. Exact: what is shown of an amount is all of it."""

from __future__ import annotations

from datetime import UTC, datetime

from markupsafe import Markup

MICROCREDITS_PER_CREDIT = 1_000_000
MINUS = "−"


def credits(amount_microcredits: int) -> Markup:
    """`1,234.567890` with the last digits set apart; plain `0` for nothing."""
    if amount_microcredits == 0:
        return Markup("0")
    whole, rest = divmod(abs(amount_microcredits), MICROCREDITS_PER_CREDIT)
    sign = MINUS if amount_microcredits < 0 else ""
    digits = f"{rest:06}"
    return Markup('{}{:,}.{}<span class="fine">{}</span>').format(sign, whole, digits[:2], digits[2:])


def count(number: int) -> str:
    return f"{number:,}".replace("-", MINUS)


def rate(tokens_per_s: float | None) -> str:
    return "–" if tokens_per_s is None else f"{tokens_per_s:,.1f}"


def milliseconds(time_us: float) -> str:
    return f"{time_us / 1000:,.2f}"


def gibibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"


def parameters(num_parameters: int) -> str:
    """`135M`, `70.6B`: the way model names say it."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if num_parameters >= size:
            return f"{num_parameters / size:.3g}{unit}"
    return str(num_parameters)


def iso_time(time_ms: int) -> str:
    return _utc(time_ms).isoformat(timespec="seconds")


def clock_time(time_ms: int) -> str:
    """UTC; the script turns it into the reader's own time."""
    return _utc(time_ms).strftime("%H:%M:%S")


def _utc(time_ms: int) -> datetime:
    return datetime.fromtimestamp(time_ms / 1000, tz=UTC)
