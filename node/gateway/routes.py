"""The routes of the API under /v1. Each reads as: who calls, with what body, answered how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from node.gateway.access import caller_of
from node.gateway.answers import AnswerShape, ChatShape, CompletionShape, Json
from node.gateway.backend import Backend, Caller, GenerationRequest, ModelCard, TextTokenizer
from node.gateway.body import JsonObject, read_json_object
from node.gateway.errors import ApiError
from node.gateway.generation_response import GenerationResponse, Job
from node.gateway.metrics import GatewayMetrics
from node.gateway.parameters import (
    COMPLETION_MAX_TOKENS,
    ChatParameters,
    CompletionParameters,
    GenerationParameters,
    parse_parameters,
)
from node.gateway.prompts import chat_prompt, generation_request, text_prompt

router = APIRouter(prefix="/v1")


@dataclass(frozen=True, slots=True)
class Gateway:
    """What the routes of one app share."""

    backend: Backend
    metrics: GatewayMetrics
    keep_alive_s: float

    def answer(
        self,
        caller: Caller,
        parameters: GenerationParameters,
        requests: list[GenerationRequest],
        tokenizer: TextTokenizer,
        shape: AnswerShape,
    ) -> Response:
        options = parameters.stream_options
        job = Job(
            caller=caller,
            requests=tuple(requests),
            tokenizer=tokenizer,
            stops=parameters.stops,
            shape=shape,
            stream=bool(parameters.stream),
            include_usage=bool(options and options.include_usage),
            continuous_usage=bool(options and options.continuous_usage_stats),
        )
        return GenerationResponse(self.backend, self.metrics, job, self.keep_alive_s)


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


CurrentGateway = Annotated[Gateway, Depends(_gateway)]


async def _caller(request: Request, gateway: CurrentGateway) -> Caller:
    return await caller_of(request, gateway.backend)


def _request_id(request: Request) -> str:
    request_id: str = request.state.request_id
    return request_id


CurrentCaller = Annotated[Caller, Depends(_caller)]
JsonBody = Annotated[JsonObject, Depends(read_json_object)]
RequestId = Annotated[str, Depends(_request_id)]


@router.get("/models")
async def list_models(gateway: CurrentGateway, caller: CurrentCaller) -> Json:
    cards = [card for card in gateway.backend.models() if _may_use(caller, card.name)]
    return {"object": "list", "data": [_model_object(card) for card in cards]}


@router.get("/models/{name:path}")
async def get_model(gateway: CurrentGateway, caller: CurrentCaller, name: str) -> Json:
    return _model_object(_model_card(gateway, caller, name))


@router.post("/chat/completions", response_model=None)
async def create_chat_completion(
    gateway: CurrentGateway, caller: CurrentCaller, body: JsonBody, request_id: RequestId
) -> Response:
    parameters = parse_parameters(ChatParameters, body)
    card = _model_card(gateway, caller, parameters.model)
    tokenizer = await gateway.backend.tokenizer(card.name)
    ids = await chat_prompt(tokenizer, parameters.messages)
    eos, most = tokenizer.eos_token_ids, _most_by_default(caller, len(ids))
    request = generation_request(parameters, ids, card, eos, most, request_id)
    return gateway.answer(
        caller, parameters, [request], tokenizer, ChatShape(card.name, bool(parameters.logprobs))
    )


@router.post("/completions", response_model=None)
async def create_completion(
    gateway: CurrentGateway, caller: CurrentCaller, body: JsonBody, request_id: RequestId
) -> Response:
    parameters = parse_parameters(CompletionParameters, body)
    card = _model_card(gateway, caller, parameters.model)
    tokenizer = await gateway.backend.tokenizer(card.name)
    eos = tokenizer.eos_token_ids
    prompts = [await text_prompt(tokenizer, prompt, card) for prompt in parameters.prompts]
    requests = [
        generation_request(parameters, ids, card, eos, COMPLETION_MAX_TOKENS, request_id) for ids in prompts
    ]
    shape = CompletionShape(card.name, parameters.logprobs is not None)
    return gateway.answer(caller, parameters, requests, tokenizer, shape)


def _most_by_default(caller: Caller, num_prompt_tokens: int) -> int | None:
    """Without a limit of its own an answer may fill the context, or what the key may use in a minute."""
    if not caller.max_num_tokens_per_minute:
        return None
    return max(1, caller.max_num_tokens_per_minute - num_prompt_tokens)


def _may_use(caller: Caller, model: str) -> bool:
    return not caller.models or model in caller.models


def _model_card(gateway: Gateway, caller: Caller, name: str) -> ModelCard:
    card = next((card for card in gateway.backend.models() if card.name == name), None)
    if card is None:
        message = f"The model '{name[:200]}' does not exist in this pod; GET /v1/models lists those that do."
        raise ApiError(404, message, param="model", code="model_not_found")
    if not _may_use(caller, name):
        raise ApiError(
            403, f"This API key may not use the model '{name}'.", param="model", code="model_not_allowed"
        )
    return card


def _model_object(card: ModelCard) -> Json:
    return {"id": card.name, "object": "model", "created": card.created_s, "owned_by": card.owner}
