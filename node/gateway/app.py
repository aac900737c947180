"""The application of one node: API, dashboard, metrics and health, over one `Backend`."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry

from node.dashboard.routes import Dashboard
from node.dashboard.routes import router as dashboard_router
from node.gateway.access import Logins
from node.gateway.backend import Backend
from node.gateway.body import BodyRoom
from node.gateway.errors import add_error_handlers
from node.gateway.metrics import GatewayMetrics, PodCollector
from node.gateway.request_context import RequestContext
from node.gateway.routes import Gateway
from node.gateway.routes import router as api_router

KEEP_ALIVE_S = 10.0


def create_app(
    backend: Backend,
    *,
    registry: CollectorRegistry | None = None,
    keep_alive_s: float = KEEP_ALIVE_S,
    is_strict: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """Every request passes `RequestContext`, then one router. `registry` may hold the node's own metrics.

    `is_strict`: browsers may be told to use nothing but HTTPS for this host name.
    """
    metrics = GatewayMetrics(registry or CollectorRegistry())
    metrics.registry.register(PodCollector(backend))
    app = FastAPI(title="gpu-pod", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.body_room = BodyRoom()
    app.state.gateway = Gateway(backend, metrics, keep_alive_s)
    app.state.dashboard = Dashboard(backend, metrics, Logins(backend))
    add_error_handlers(app)
    app.add_middleware(RequestContext, metrics=metrics, is_strict=is_strict)
    app.include_router(api_router)
    app.include_router(dashboard_router)
    app.add_api_route("/healthz", health, methods=["GET", "HEAD"])
    return app


async def health() -> PlainTextResponse:
    """Unauthenticated, so it says no more than that the node answers."""
    return PlainTextResponse("ok\n")
