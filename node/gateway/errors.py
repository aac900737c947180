"""OpenAI error objects: the one exception routes raise, what each refusal of the node becomes, the handlers.

A client's mistake is 4xx and names the parameter; the pod's own faults are 503 (retried by the official
clients), lack of credit is 429 with `x-should-retry: false`. Knows nothing about requests' meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from node.gateway.backend import (
    BackendRefusal,
    GenerationFailed,
    KeyRefused,
    NoRoute,
    QuotaExceeded,
    RateLimited,
    WaitedTooLong,
)


class ErrorBody(TypedDict):
    """The inner object of `{"error": …}`."""

    message: str
    type: str
    param: str | None
    code: str | None


class ApiError(Exception):
    """An answer other than 200. `message` is read by people, `code` by programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body: ErrorBody = {"message": message, "type": type, "param": param, "code": code}

    def response(self) -> JSONResponse:
        return JSONResponse({"error": self.body}, status_code=self.status, headers=self.headers)


def bad_parameter(param: str, message: str, code: str | None = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def key_error(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def internal_error() -> ApiError:
    return ApiError(
        500, "The node failed to answer; its log has the reason.", type="server_error", code="internal"
    )


def error_of(refusal: BackendRefusal) -> ApiError:
    """The answer for each way the node says no."""
    message = str(refusal)
    match refusal:
        case KeyRefused():
            return key_error(message)
        case QuotaExceeded():
            headers = {"x-should-retry": "false"}
            code = "insufficient_quota"
            return ApiError(429, message, type=code, code=code, headers=headers)
        case RateLimited():
            # A request that is larger than the limit will never fit: no use in sending it again.
            wait_s = refusal.retry_after_s
            headers = {"x-should-retry": "false"} if wait_s is None else {"retry-after": str(wait_s)}
            return ApiError(429, message, type=refusal.unit, code="rate_limit_exceeded", headers=headers)
        case WaitedTooLong():
            headers = {"retry-after": str(refusal.retry_after_s)}
            return ApiError(429, message, type="rate_limit_error", code="pod_busy", headers=headers)
        case NoRoute():
            return ApiError(503, message, type="server_error", code="no_route")
        case GenerationFailed():
            return ApiError(503, message, type="server_error", code="generation_failed")
        case _:
            return ApiError(503, message, type="server_error", code="unavailable")


async def _api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def _backend_refusal(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BackendRefusal)
    return error_of(error).response()


async def _http_exception(request: Request, error: Exception) -> JSONResponse:
    """Routing's own refusals: unknown path, wrong method."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    known = {
        404: ("unknown_url", f"Unknown request URL: {where}."),
        405: ("method_not_supported", f"Not allowed: {where}."),
    }
    code, message = known.get(error.status_code, (None, str(error.detail)))
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(BackendRefusal, _backend_refusal)
    app.add_exception_handler(HTTPException, _http_exception)
