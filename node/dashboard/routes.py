"""What a browser and Prometheus may ask of a node: dashboard, live updates, login, metrics, static files."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import parse_qs

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from node.dashboard.live_view import LiveViewResponse, LiveViews
from node.dashboard.pages import dashboard_page, login_page, static_file
from node.gateway.access import COOKIE, LOGIN_LIFETIME_S, Logins, authenticate, caller_of, is_same_origin
from node.gateway.backend import Backend, KeyRefused
from node.gateway.body import read_body
from node.gateway.errors import ApiError
from node.gateway.metrics import GatewayMetrics

MAX_FORM_BYTES = 16 * 1024
STATIC_TYPES = {"dashboard.css": "text/css", "dashboard.js": "text/javascript", "pod.svg": "image/svg+xml"}

SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))


def _check_origin(request: Request) -> None:
    """For every action of the dashboard, whoever adds it."""
    if request.method not in SAFE_METHODS and not is_same_origin(request):
        raise ApiError(403, "This form was sent from another site.", code="wrong_origin")


router = APIRouter(dependencies=[Depends(_check_origin)])


class Dashboard:
    """What the routes of one app share."""

    def __init__(self, backend: Backend, metrics: GatewayMetrics, logins: Logins) -> None:
        self.backend = backend
        self.metrics = metrics
        self.logins = logins
        self.views = LiveViews(backend)

    def stop(self) -> None:
        """End the open event streams; browsers reconnect when the node is back."""
        self.views.stop()


def _dashboard(request: Request) -> Dashboard:
    dashboard: Dashboard = request.app.state.dashboard
    return dashboard


CurrentDashboard = Annotated[Dashboard, Depends(_dashboard)]


@router.get("/", response_model=None)
async def show_dashboard(request: Request, dashboard: CurrentDashboard) -> Response:
    if not dashboard.logins.may_view(request):
        return RedirectResponse("/login", status_code=303)
    return HTMLResponse(dashboard_page(dashboard.backend.dashboard(), logged_in=COOKIE in request.cookies))


@router.get("/events", response_model=None)
async def live_view(request: Request, dashboard: CurrentDashboard) -> Response:
    if not dashboard.logins.may_view(request):
        raise ApiError(401, "Log in first.", code="login_required")
    return LiveViewResponse(dashboard.views, lambda: dashboard.logins.may_view(request))


@router.get("/login", response_model=None)
async def show_login() -> Response:
    return HTMLResponse(login_page())


@router.post("/login", response_model=None)
async def log_in(request: Request, dashboard: CurrentDashboard) -> Response:
    try:
        dashboard.logins.count_attempt(request.client.host if request.client else "")
        caller = await authenticate(await _form_field(request, "key"), dashboard.backend)
    except (ApiError, KeyRefused) as error:
        status, headers = (error.status, error.headers) if isinstance(error, ApiError) else (401, {})
        return HTMLResponse(login_page(str(error)), status_code=status, headers=headers)
    response = RedirectResponse("/", status_code=303)
    response.set_cookie(
        COOKIE,
        dashboard.logins.cookie(caller),
        max_age=LOGIN_LIFETIME_S,
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
    return response


@router.post("/logout", response_model=None)
async def log_out() -> Response:
    response = RedirectResponse("/login", status_code=303)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return response


@router.get("/metrics", response_model=None)
async def show_metrics(request: Request, dashboard: CurrentDashboard) -> Response:
    if not dashboard.logins.may_view(request):
        await caller_of(request, dashboard.backend)
    return Response(generate_latest(dashboard.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/static/{name}", response_model=None)
async def static(name: str) -> Response:
    """Style, script and icon of the login page too, so without a login; they say nothing about the pod."""
    if name not in STATIC_TYPES:
        raise ApiError(404, "No such file.", code="unknown_url")
    headers = {"cache-control": "public, max-age=31536000, immutable"}
    return Response(static_file(name), media_type=STATIC_TYPES[name], headers=headers)


async def _form_field(request: Request, name: str) -> str:
    body = await read_body(request, MAX_FORM_BYTES)
    try:
        fields = parse_qs(body.decode(), max_num_fields=8)
    except ValueError:
        raise ApiError(400, "The form is damaged.") from None
    return fields.get(name, [""])[0].strip()
