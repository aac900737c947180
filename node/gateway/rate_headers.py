"""OpenAI's `x-ratelimit-*` headers: what a limited key may still do in this minute, on all its answers."""

from __future__ import annotations

from node.gateway.backend import Backend, Caller


def rate_headers(backend: Backend, caller: Caller) -> dict[str, str]:
    """Of the moment the answer begins, so that it counts the request it answers. Empty without limits."""
    headers = {}
    for limit in backend.rate_limits(caller):
        headers[f"x-ratelimit-limit-{limit.unit}"] = str(limit.limit)
        headers[f"x-ratelimit-remaining-{limit.unit}"] = str(limit.remaining)
        headers[f"x-ratelimit-reset-{limit.unit}"] = duration_text(limit.reset_ms)
    return headers


def duration_text(duration_ms: int) -> str:
    """`120ms`, `1s`, `7.5s`, `1m0s`, as the original writes them."""
    if duration_ms < 1000:
        return f"{duration_ms}ms" if duration_ms else "0s"
    minutes, rest_ms = divmod(duration_ms, 60_000)
    seconds = f"{rest_ms / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
