"""Who may ask what: bearer keys for the API, local access or a login for what browsers see.

The API needs a key even from this machine, because any web page and any local program can reach loopback.
Local access means that both ends are this machine: the peer is loopback, the Host header names loopback (a
rebound DNS name does not), and no proxy forwarded the request. Knows the backend's port; keeps no secret but
the key that signs login cookies, which lives as long as the process.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from urllib.parse import urlsplit

from fastapi import Request

from node.gateway.backend import Backend, Caller
from node.gateway.errors import ApiError, key_error
from node.gateway.rate_headers import rate_headers

COOKIE = "pod_login"
LOGIN_LIFETIME_S = 12 * 3600
MAX_NUM_LOGIN_ATTEMPTS = 10
LOGIN_WINDOW_S = 60.0
MAX_NUM_ADDRESSES = 1024
MAX_BEARER_CHARS = 4096

_FORWARDING_HEADERS = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")


async def caller_of(request: Request, backend: Backend) -> Caller:
    """The member behind the request's API key, or `ApiError` 401 / `KeyRefused`."""
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    bearer = bearer.strip()
    if scheme.lower() != "bearer" or not bearer:
        raise key_error(
            "No API key given. Send 'Authorization: Bearer sk-pod-…'; `pod key create` makes one."
        )
    caller = await authenticate(bearer, backend)
    request.state.rate_headers = partial(rate_headers, backend, caller)
    return caller


async def authenticate(bearer: str, backend: Backend) -> Caller:
    if len(bearer) > MAX_BEARER_CHARS or not bearer.isascii():
        raise key_error("Incorrect API key provided: it is damaged.")
    return await backend.authenticate(bearer)


def is_local(request: Request) -> bool:
    client = request.client
    if client is None or not _is_loopback(client.host):
        return False
    if any(name in request.headers for name in _FORWARDING_HEADERS):
        return False
    hosts = request.headers.getlist("host")
    return len(hosts) == 1 and _is_loopback(_hostname(hosts[0]))


def is_same_origin(request: Request) -> bool:
    """Browsers say where a form came from; a page elsewhere must not act for who looks at it.

    Who says nothing is no browser, and has no login that a page could use.
    """
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = request.headers.get("origin")
    if origin is None:
        return True
    scheme, _, host = origin.partition("://")
    # Behind a proxy that ends TLS this connection is plain while the page is not.
    return host == request.headers.get("host") and scheme in ("https", request.scope["scheme"])


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _one_sender(address: str) -> str:
    """Whoever has an IPv6 address has a network of them."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


class Logins:
    """Signed, expiring login cookies, and how often an address may try to get one."""

    def __init__(self, backend: Backend, now_s: Callable[[], float] = time.time) -> None:
        self._backend = backend
        self._now_s = now_s
        self._secret = secrets.token_bytes(32)
        self._attempts: OrderedDict[str, list[float]] = OrderedDict()

    def count_attempt(self, address: str) -> None:
        """Raises `ApiError` 429 when there were too many lately."""
        now_s = self._now_s()
        address = _one_sender(address)
        recent = [at for at in self._attempts.pop(address, []) if at > now_s - LOGIN_WINDOW_S]
        self._attempts[address] = recent
        if len(self._attempts) > MAX_NUM_ADDRESSES:
            self._attempts.popitem(last=False)
        if len(recent) >= MAX_NUM_LOGIN_ATTEMPTS:
            wait_s = int(recent[0] + LOGIN_WINDOW_S - now_s) + 1
            message = f"Too many attempts; try again in {wait_s} s."
            raise ApiError(429, message, code="too_many_attempts", headers={"retry-after": str(wait_s)})
        recent.append(now_s)

    def cookie(self, caller: Caller) -> str:
        expires_s = int(self._now_s()) + LOGIN_LIFETIME_S
        text = f"{expires_s}.{caller.member.hex()}.{caller.key_id.hex()}"
        return f"{text}.{self._sign(text)}"

    def is_valid(self, cookie: str) -> bool:
        """Signed by this process, not expired, and the key behind it still stands in the roster."""
        text, _, signature = cookie.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._sign(text).encode()):
            return False
        expires_s, member, key_id = text.split(".")
        if int(expires_s) <= self._now_s():
            return False
        return self._backend.may_view(bytes.fromhex(member), bytes.fromhex(key_id))

    def may_view(self, request: Request) -> bool:
        return is_local(request) or self.is_valid(request.cookies.get(COOKIE, ""))

    def _sign(self, text: str) -> str:
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()
