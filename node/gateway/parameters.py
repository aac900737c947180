"""The documented parameters of chat and text completions: honoured, harmless, or refused by name.

Nothing that would change the output is ignored: a parameter this gateway cannot honour is accepted only at
the value that means "off" (`OFF_VALUES`), and an unknown one is refused as the original API does. Knows the
shapes of requests; no model, no tokenizer.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from node.gateway.body import JsonObject
from node.gateway.errors import ApiError, bad_parameter
from node.links.frames import MAX_NUM_LOGIT_BIASES, MAX_NUM_TOP_LOGPROBS, Sampling

MAX_NUM_STOPS = 4
MAX_NUM_PROMPTS = 32
MAX_SEED = 2**63 - 1
MAX_NUM_STOP_TOKEN_IDS = 128
COMPLETION_MAX_TOKENS = 16
COMPLETION_MAX_NUM_LOGPROBS = 5

OFF_VALUES: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}

NonEmpty = Annotated[str, Field(min_length=1)]
Text = Annotated[str, Field(max_length=4096)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
PositiveCount = Annotated[int, Field(ge=1, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenIdText = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """`continuous_usage_stats` is what load tools send to count tokens chunk by chunk."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationParameters(_Strict):
    """What both endpoints share. The last block is accepted and changes nothing."""

    model: NonEmpty
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[TokenIdText, Bias], Field(max_length=MAX_NUM_LOGIT_BIASES)] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=MAX_NUM_STOPS)] | None = None
    max_tokens: PositiveCount | None = None
    max_completion_tokens: PositiveCount | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_NUM_STOP_TOKEN_IDS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    user: Text | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    prediction: dict[str, object] | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_options: dict[str, object] | None = None
    prompt_cache_retention: Text | None = None
    safety_identifier: Text | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Options that contradict each other are refused, not resolved by guessing."""
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise bad_parameter("max_tokens", "max_tokens and max_completion_tokens differ; set one of them.")
        if self.stream_options is not None and not self.stream:
            raise bad_parameter("stream_options", "stream_options is only allowed with stream: true.")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def max_num_output_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_top_logprobs(self) -> int:
        """How many alternatives the answer lists per token; -1: no logprobs at all."""
        return -1

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        return tuple((int(token_id), float(bias)) for token_id, bias in (self.logit_bias or {}).items())

    def sampling(self, max_num_output_tokens: int, eos_token_ids: tuple[int, ...]) -> Sampling:
        """For the last stage. top_p 0 keeps only the likeliest token, which is greedy.

        ignore_eos is about the model's own ends: the caller's stop tokens stop all the same.
        """
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        stops = tuple(self.stop_token_ids or ())
        ends = () if self.ignore_eos and stops else eos_token_ids
        return Sampling(
            temperature=float(temperature) if top_p > 0 else 0.0,
            top_p=float(top_p) if top_p > 0 else 1.0,
            top_k=max(0, self.top_k or 0),
            seed=secrets.randbits(63) if self.seed is None else self.seed % (MAX_SEED + 1),
            max_num_output_tokens=max_num_output_tokens,
            min_num_output_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos) and not stops,
            eos_token_ids=tuple(dict.fromkeys(ends + stops)),
            min_p=float(self.min_p or 0),
            frequency_penalty=float(self.frequency_penalty or 0),
            presence_penalty=float(self.presence_penalty or 0),
            repetition_penalty=1.0 if self.repetition_penalty is None else float(self.repetition_penalty),
            logit_bias=self.biases,
            num_top_logprobs=self.num_top_logprobs,
        )


class ContentPart(_Strict):
    type: Literal["text", "refusal"]
    text: str = ""
    refusal: str = ""


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] | None = None
    name: Text | None = None
    refusal: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, value: object) -> object:
        """Tool turns and media are documented, so they get their own words instead of "unrecognized"."""
        if not isinstance(value, dict):
            return value
        if value.get("role") in ("tool", "function") or value.get("tool_calls") or value.get("function_call"):
            raise ValueError("tool calls are not supported by this pod")
        content = value.get("content")
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("image_url", "input_audio", "file", "video_url", "audio_url"):
                raise ValueError(f"the model takes text only; a content part of type {kind} is not supported")
        if content is None and value.get("role") != "assistant":
            raise ValueError("content is missing")
        off = {"tool_calls", "function_call", "audio"}
        return {name: item for name, item in value.items() if item is not None or name not in off}

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text or part.refusal for part in self.content)
        return self.content or self.refusal or ""

    def for_template(self) -> dict[str, str]:
        """`developer` is the newer name of `system`; templates know only the latter."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.text}
        return message if self.name is None else message | {"name": self.name}


class ChatParameters(GenerationParameters):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_NUM_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _logprobs_agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise bad_parameter("top_logprobs", "top_logprobs is only allowed with logprobs: true.")
        return self

    @property
    def num_top_logprobs(self) -> int:
        return self.top_logprobs or 0 if self.logprobs else -1


class CompletionParameters(GenerationParameters):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )

    logprobs: Annotated[int, Field(ge=0, le=COMPLETION_MAX_NUM_LOGPROBS)] | None = None

    @property
    def num_top_logprobs(self) -> int:
        return -1 if self.logprobs is None else self.logprobs

    @model_validator(mode="after")
    def _few_prompts(self) -> Self:
        if len(self.prompts) > MAX_NUM_PROMPTS:
            raise bad_parameter("prompt", f"At most {MAX_NUM_PROMPTS} prompts in one request.")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per choice: text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]


P = TypeVar("P", bound=GenerationParameters)


def parse_parameters(kind: type[P], body: JsonObject) -> P:
    """The checked parameters, or `ApiError` 400 that names the first one at fault."""
    for name in body.keys() & OFF_VALUES.keys():
        _check_off(name, body[name])
    try:
        return kind.model_validate({name: value for name, value in body.items() if name not in OFF_VALUES})
    except ValidationError as error:
        raise _first_error(error) from None


def _check_off(name: str, value: object) -> None:
    off = OFF_VALUES[name]
    if value is None or any(value == item and type(value) in (type(item), float) for item in off):
        return
    but = f" other than {' or '.join(repr(item) for item in off)}" if off else ""
    raise bad_parameter(name, f"{name}{but} is not supported by this pod.", "unsupported_parameter")


def _first_error(error: ValidationError) -> ApiError:
    """One line for the parameter at fault. Of the alternatives of a union, the one that came furthest."""
    details = error.errors(include_url=False, include_context=False)
    top = details[0]["loc"][0] if details[0]["loc"] else ""
    detail = max((item for item in details if item["loc"][:1] == (top,)), key=_how_far)
    param = _path(detail["loc"]) or None
    kind, message = detail["type"], detail["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return ApiError(
            400, f"Unrecognized request argument supplied: {param}.", param=param, code="unknown_parameter"
        )
    if kind == "missing":
        message = f"Missing required parameter: '{param}'."
        return ApiError(400, message, param=param, code="missing_required_parameter")
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return ApiError(400, f"Invalid '{param}': {message}.", param=param, code=code)


def _how_far(detail: ErrorDetails) -> tuple[int, bool]:
    return len(detail["loc"]), not detail["type"].endswith("_type")


def _path(where: tuple[int | str, ...]) -> str:
    """`messages[0].content`. Pydantic's names of union branches are no part of the request."""
    path = ""
    for step in where:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step.isidentifier() and step not in ("str", "int", "float"):
            path += f".{step}" if path else step
    return path
