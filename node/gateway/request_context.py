"""The one middleware: request id, timing, security headers, counting, and the last resort for errors.

Plain ASGI, because anything that wraps `receive` would hide from a stream that its client has gone.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from node.gateway.errors import internal_error
from node.gateway.metrics import GatewayMetrics

SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Not "no-referrer": that makes browsers send the login form with "Origin: null".
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}

# Browsers complain of it on pages that came over plain HTTP.
HTTPS_HEADERS = {"cross-origin-opener-policy": "same-origin"}

# A browser applies it to every port of the host: only for a gateway that has the host's HTTPS port to itself,
# with a certificate that any browser takes.
STRICT_TRANSPORT = "max-age=31536000"
HTTPS_PORT = 443

log = logging.getLogger(__name__)


class RequestContext:
    def __init__(self, app: ASGIApp, metrics: GatewayMetrics, is_strict: Callable[[], bool]) -> None:
        self._app = app
        self._metrics = metrics
        self._is_strict = is_strict

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = time.perf_counter()
        request_id = f"req_{secrets.token_hex(16)}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message["headers"])
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round((time.perf_counter() - started_at) * 1000))
                headers.update(SECURITY_HEADERS)
                if scope["scheme"] == "https":
                    headers.update(HTTPS_HEADERS)
                headers.setdefault("cache-control", "no-store")
                # Who asked with a key that has limits is told how they stand, whatever the answer is.
                if (rate_headers := scope["state"].get("rate_headers")) is not None:
                    headers.update(rate_headers())
                if _is_https_port(scope) and self._is_strict():
                    headers["strict-transport-security"] = STRICT_TRANSPORT
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            log.exception("request %s failed", request_id)
            if not status:
                await internal_error().response()(scope, receive, send_with_headers)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            # 499: the client left before there was an answer (nginx's word for it).
            self._metrics.count_request(route, status or 499, time.perf_counter() - started_at)


def _is_https_port(scope: Scope) -> bool:
    server = scope.get("server")
    return scope["scheme"] == "https" and server is not None and server[1] == HTTPS_PORT
