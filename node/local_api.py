"""The operations over HTTP for this machine's own `pod` command: one POST, progress and result in lines.

Only the token in the state directory opens it, from this machine; an API key does not.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from node.errors import UserError
from node.gateway.access import is_local
from node.gateway.body import read_body

MAX_ARGUMENTS_BYTES = 64 * 1024
MAX_NUM_PROGRESS_WAITING = 1000

log = logging.getLogger(__name__)

RunHere = Callable[[str, Mapping[str, object], Callable[[Mapping[str, object]], None]], Awaitable[object]]
"""`run(operation, arguments, tell_progress)` -> the result as plain data. Raises UserError."""


def local_router(run: RunHere, local_token: Callable[[], str]) -> APIRouter:
    router = APIRouter(prefix="/pod/v1")

    @router.post("/{operation}")
    async def perform(operation: str, request: Request) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if (
            not is_local(request)
            or not local_token()
            or not hmac.compare_digest(given.encode(), local_token().encode())
        ):
            return JSONResponse({"error": {"message": "not for this caller"}}, status_code=403)
        body = await read_body(request, MAX_ARGUMENTS_BYTES)
        try:
            arguments = json.loads(body or b"{}")
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            return JSONResponse({"error": {"message": "not a JSON object"}}, status_code=400)
        return StreamingResponse(_lines(run, operation, arguments), media_type="application/x-ndjson")

    return router


async def _lines(run: RunHere, operation: str, arguments: Mapping[str, object]) -> AsyncIterator[bytes]:
    waiting: asyncio.Queue[Mapping[str, object]] = asyncio.Queue(MAX_NUM_PROGRESS_WAITING)

    def tell(progress: Mapping[str, object]) -> None:
        # Progress that nobody reads fast enough is not worth memory.
        if not waiting.full():
            waiting.put_nowait(progress)

    task = asyncio.ensure_future(run(operation, arguments, tell))
    try:
        while not task.done() or not waiting.empty():
            getting = asyncio.ensure_future(waiting.get())
            await asyncio.wait({task, getting}, return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                yield _line({"progress": getting.result()})
            else:
                getting.cancel()
        yield _line({"result": task.result()})
    except UserError as error:
        yield _line({"error": {"message": str(error)}})
    except Exception:
        log.exception("the operation %s failed", operation)
        yield _line({"error": {"message": f"the node failed to do {operation}; its log says why"}})
    finally:
        task.cancel()


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"
