"""The HTTP answer that holds generations open: opens them, writes what they say, settles them.

Everything happens inside one task that ends when the client goes away, so a generation never outlives its
request. Headers wait for the first token (or the first keep-alive): a stage that dies before then is a plain
503, which official clients retry; after that it is an error event. Knows no parameter names.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from node.gateway.answers import AnswerShape, Choice, Json, total_usage, usage_object
from node.gateway.backend import (
    Backend,
    BackendRefusal,
    Caller,
    Generation,
    GenerationRequest,
    TextTokenizer,
    Usage,
    WaitedTooLong,
)
from node.gateway.delivery import Delivery
from node.gateway.errors import error_of, internal_error
from node.gateway.events import ClientGone, ClientStalled, EventWriter, event, is_open_of, while_connected
from node.gateway.metrics import GatewayMetrics
from node.gateway.together import together

MAX_ROUTE_HEADER_CHARS = 4096

log = logging.getLogger(__name__)

Deliver = Callable[[int, Delivery], Awaitable[None]]
"""`deliver(index, delivery)`: all of one choice, to the client or to the whole answer."""


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
        # In the order of the requests, as far as they are open.
        self._deliveries: list[Delivery] = []
        self._num_ended = 0
        self._one_ended = asyncio.Event()
        self._turn = asyncio.Lock()
        # Until then a refusal is a plain status code, so no keep-alive may send the headers.
        self._begun = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._answer(scope, receive, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as closing:
            if self._job.stream:
                await self._write_stream(closing, EventWriter(send, self._route_headers, is_open_of(scope)))
            else:
                await (await self._whole(closing))(scope, receive, send)

    async def _each(self, closing: AsyncExitStack, deliver: Deliver) -> list[Usage]:
        """Requests are opened in turn; each is delivered once it is open, and settled once it has ended: what
        has ended makes room for what still waits for a place.
        """

        async def one(request: GenerationRequest) -> None:
            async with self._turn:
                delivery = await self._open(request, closing)
                index = len(self._deliveries) - 1
            await deliver(index, delivery)
            await delivery.settle()
            self._num_ended += 1
            self._one_ended.set()

        await together([one(request) for request in self._job.requests])
        return [await delivery.settle() for delivery in self._deliveries]

    async def _open(self, request: GenerationRequest, closing: AsyncExitStack) -> Delivery:
        job = self._job
        generation = await self._generate(request)
        min_num_tokens = request.sampling.min_num_output_tokens
        delivery = Delivery(generation, job.tokenizer, job.stops, min_num_tokens)
        closing.push_async_callback(self._close, delivery, request.model)
        self._deliveries.append(delivery)
        if len(self._deliveries) == len(job.requests):
            self._begun.set()
        return delivery

    async def _generate(self, request: GenerationRequest) -> Generation:
        """While others of this answer run, it waits for their places, however long."""
        while True:
            try:
                return await self._backend.generate(self._job.caller, request)
            except WaitedTooLong:
                if self._num_ended == len(self._deliveries):
                    raise
                self._one_ended.clear()
                await self._one_ended.wait()

    async def _close(self, delivery: Delivery, model: str) -> None:
        # A client that goes while this settles cancels the wait; what is settled is counted all the same.
        await asyncio.shield(asyncio.create_task(self._settle_and_count(delivery, model)))

    async def _settle_and_count(self, delivery: Delivery, model: str) -> None:
        usage = await delivery.close()
        self._metrics.count_tokens(model, usage.num_prompt_tokens, usage.num_output_tokens)

    def _route_headers(self) -> dict[str, str]:
        return {"x-pod-route": route_header(self._deliveries)}

    async def _whole(self, closing: AsyncExitStack) -> JSONResponse:
        choices = [Choice() for _ in self._job.requests]

        async def collect(index: int, delivery: Delivery) -> None:
            async with aclosing(delivery.pieces()) as pieces:
                async for piece in pieces:
                    choices[index].add(piece)
                    delivery.num_delivered = piece.num_output_tokens

        try:
            usages = await self._each(closing, collect)
        except BackendRefusal:
            # The answer never leaves, so nothing of it was delivered; choices that had ended are paid.
            for delivery in self._deliveries:
                delivery.num_delivered = 0
            raise
        body = self._job.shape.whole(choices) | {"usage": total_usage(usages)}
        return JSONResponse(body, headers=self._route_headers())

    async def _write_stream(self, closing: AsyncExitStack, writer: EventWriter) -> None:
        try:
            async with writer.kept_alive(self._keep_alive_s, self._begun):
                usages = await self._each(closing, self._writing_pieces(writer))
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

    def _writing_pieces(self, writer: EventWriter) -> Deliver:
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
                    usage = self._chunk_usage(index, piece.num_output_tokens)
                    chunks, opening = opening + shape.chunks(index, piece), []
                    await writer.write(b"".join([event(chunk | usage) for chunk in chunks]))
                    self._begun.set()
                    delivery.delivered(piece.num_output_tokens)

        return write_all

    def _chunk_usage(self, index: int, num_output_tokens: int) -> Json:
        """Chunks before the last say `usage: null` when usage was asked for, as the original does."""
        if self._job.continuous_usage:
            num_prompt_tokens = sum(len(request.prompt_ids) for request in self._job.requests)
            others = sum(d.num_delivered for at, d in enumerate(self._deliveries) if at != index)
            return {"usage": usage_object(num_prompt_tokens, others + num_output_tokens, 0)}
        return {"usage": None} if self._job.include_usage else {}


def route_header(deliveries: Sequence[Delivery]) -> str:
    """Distinct routes of the choices that are open. Node names are others' words: nothing but printable ASCII
    leaves.
    """
    text = "; ".join(dict.fromkeys(delivery.generation.route_text for delivery in deliveries))
    return "".join(char if " " <= char <= "~" else "?" for char in text)[:MAX_ROUTE_HEADER_CHARS]
