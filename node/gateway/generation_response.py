"""The HTTP answer that holds generations open: opens them, writes what they say, settles them.

Everything happens inside one task that ends when the client goes away, so a generation never outlives its
request. Headers wait for the first token (or the first keep-alive): a stage that dies before then is a plain
503, which official clients retry; after that it is an error event. Knows no parameter names.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from node.gateway.answers import AnswerShape, Choice, Json, total_usage, usage_object
from node.gateway.backend import (
    Backend,
    BackendRefusal,
    Caller,
    GenerationRequest,
    TextTokenizer,
)
from node.gateway.delivery import Delivery
from node.gateway.errors import error_of, internal_error
from node.gateway.events import ClientGone, ClientStalled, EventWriter, event, is_open_of, while_connected
from node.gateway.metrics import GatewayMetrics
from node.gateway.together import together

MAX_ROUTE_HEADER_CHARS = 4096

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be generated, for whom, and how it is told. One request per choice."""

    caller: Caller
    requests: tuple[GenerationRequest, ...]
    tokenizer: TextTokenizer
    stops: tuple[str, ...]
    shape: AnswerShape
    stream: bool
    include_usage: bool = False
    continuous_usage: bool = False


class GenerationResponse(Response):
    def __init__(self, backend: Backend, metrics: GatewayMetrics, job: Job, keep_alive_s: float) -> None:
        super().__init__()
        self._backend = backend
        self._metrics = metrics
        self._job = job
        self._keep_alive_s = keep_alive_s
        self._started_at = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._answer(scope, receive, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as open_deliveries:
            deliveries = [await self._open(request, open_deliveries) for request in self._job.requests]
            if self._job.stream:
                headers = {"x-pod-route": route_header(deliveries)}
                await self._write_stream(deliveries, EventWriter(send, headers, is_open_of(scope)))
            else:
                await (await self._whole(deliveries))(scope, receive, send)

    async def _open(self, request: GenerationRequest, open_deliveries: AsyncExitStack) -> Delivery:
        job = self._job
        generation = await self._backend.generate(job.caller, request)
        min_num_tokens = request.sampling.min_num_output_tokens
        delivery = Delivery(generation, job.tokenizer, job.stops, min_num_tokens)
        open_deliveries.push_async_callback(self._close, delivery, request.model)
        return delivery

    async def _close(self, delivery: Delivery, model: str) -> None:
        usage = await delivery.close()
        self._metrics.count_tokens(model, usage.num_prompt_tokens, usage.num_output_tokens)

    async def _whole(self, deliveries: Sequence[Delivery]) -> JSONResponse:
        choices = [Choice() for _ in deliveries]
        pairs = zip(deliveries, choices, strict=True)
        try:
            await together([_collect(delivery, choice) for delivery, choice in pairs])
        except BackendRefusal:
            # The answer never leaves, so nothing of it was delivered.
            for delivery in deliveries:
                delivery.num_delivered = 0
            raise
        usages = [await delivery.settle() for delivery in deliveries]
        body = self._job.shape.whole(choices) | {"usage": total_usage(usages)}
        return JSONResponse(body, headers={"x-pod-route": route_header(deliveries)})

    async def _write_stream(self, deliveries: Sequence[Delivery], writer: EventWriter) -> None:
        try:
            async with writer.kept_alive(self._keep_alive_s):
                await self._write_pieces(deliveries, writer)
            usages = [await delivery.settle() for delivery in deliveries]
            if self._job.include_usage:
                usage = {"usage": total_usage(usages)}
                await writer.write(event(self._job.shape.usage_chunk() | usage))
            await writer.end(b"data: [DONE]\n\n")
        except Exception as error:
            if not writer.started or isinstance(error, ClientStalled | ClientGone):
                raise
            if not isinstance(error, BackendRefusal):
                log.exception("a stream broke off")
            told = error_of(error) if isinstance(error, BackendRefusal) else internal_error()
            await writer.end(event({"error": told.body}))

    async def _write_pieces(self, deliveries: Sequence[Delivery], writer: EventWriter) -> None:
        shape = self._job.shape
        opening = shape.opening_chunks()
        is_first = True

        async def write_all(index: int, delivery: Delivery) -> None:
            nonlocal opening, is_first
            async with aclosing(delivery.pieces()) as pieces:
                async for piece in pieces:
                    if is_first:
                        is_first = False
                        self._metrics.observe_first_token(time.monotonic() - self._started_at)
                    usage = self._chunk_usage(deliveries, index, piece.num_output_tokens)
                    chunks, opening = opening + shape.chunks(index, piece), []
                    await writer.write(b"".join([event(chunk | usage) for chunk in chunks]))
                    delivery.delivered(piece.num_output_tokens)

        await together([write_all(index, delivery) for index, delivery in enumerate(deliveries)])

    def _chunk_usage(self, deliveries: Sequence[Delivery], index: int, num_output_tokens: int) -> Json:
        """Chunks before the last say `usage: null` when usage was asked for, as the original does."""
        if self._job.continuous_usage:
            num_prompt_tokens = sum(delivery.generation.num_prompt_tokens for delivery in deliveries)
            others = sum(d.num_delivered for at, d in enumerate(deliveries) if at != index)
            return {"usage": usage_object(num_prompt_tokens, others + num_output_tokens, 0)}
        return {"usage": None} if self._job.include_usage else {}


async def _collect(delivery: Delivery, choice: Choice) -> None:
    async with aclosing(delivery.pieces()) as pieces:
        async for piece in pieces:
            choice.add(piece)
            delivery.num_delivered = piece.num_output_tokens


def route_header(deliveries: Sequence[Delivery]) -> str:
    """Distinct routes of the choices. Node names are others' words: nothing but printable ASCII leaves."""
    text = "; ".join(dict.fromkeys(delivery.generation.route_text for delivery in deliveries))
    return "".join(char if " " <= char <= "~" else "?" for char in text)[:MAX_ROUTE_HEADER_CHARS]
