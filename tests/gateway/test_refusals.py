"""Every bad input gets the right status, an OpenAI error object that names it, and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import openai
import pytest
from openai import OpenAI

from node.gateway.backend import BackendRefusal, GenerationFailed, NoRoute, QuotaExceeded, WaitedTooLong
from node.gateway.body import MAX_BODY_BYTES
from tests.gateway.conftest import RunningGateway, run_gateway
from tests.gateway.fake_backend import CONTEXT_TOKENS, KEY, MODEL, REVOKED_KEY, VOCAB_SIZE, FakeBackend
from tests.gateway.openai_schema import check

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
HTTP = httpx.Client(timeout=10, verify=False)  # one, because each loads the certificates it never uses
AUTH = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningGateway]:
    """Refusals leave nothing behind, so one gateway serves the whole table."""
    yield from run_gateway(FakeBackend())


def refused(gateway: RunningGateway, path: str, status: int, code: str | None, **request: object) -> dict:
    request.setdefault("headers", AUTH)
    response = HTTP.request(request.pop("method", "POST"), gateway.url + path, **request)
    assert response.status_code == status, response.text
    body = response.json()
    check("ErrorResponse", body)
    assert body["error"]["code"] == code, body
    assert "\n" not in body["error"]["message"]
    assert response.headers["x-request-id"].startswith("req_")
    assert gateway.backend.generations == []
    return body["error"]


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("function_call", {"name": "f"}),
        ("functions", [{"name": "f"}]),
        ("modalities", ["text", "audio"]),
        ("n", 2),
        ("n", True),
        ("reasoning_effort", "high"),
        ("response_format", {"type": "json_object"}),
        ("service_tier", "priority"),
        ("store", True),
        ("tool_choice", "required"),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("web_search_options", {}),
    ],
)
def test_what_would_change_the_output_is_refused_by_name(
    shared: RunningGateway, param: str, value: object
) -> None:
    body = {"model": MODEL, "messages": HI, param: value}
    error = refused(shared, CHAT, 400, "unsupported_parameter", json=body)
    assert error["param"] == param
    assert param in error["message"]


@pytest.mark.parametrize(("param", "value"), [("echo", True), ("suffix", "x"), ("best_of", 2)])
def test_completion_parameters_refused_by_name(shared: RunningGateway, param: str, value: object) -> None:
    body = {"model": MODEL, "prompt": "a", param: value}
    assert refused(shared, TEXT, 400, "unsupported_parameter", json=body)["param"] == param


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"model": None}, "model", "invalid_type"),
        ({"model": 5}, "model", "invalid_type"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "Hi"}, "messages", "invalid_type"),
        ({"messages": [5]}, "messages[0]", "invalid_type"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        (
            {"messages": [{"role": "tool", "content": "a", "tool_call_id": "b"}]},
            "messages[0]",
            "invalid_value",
        ),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"temperature": 1e300}, "temperature", "invalid_value"),
        ({"top_p": 1.01}, "top_p", "invalid_value"),
        ({"top_k": -2}, "top_k", "invalid_value"),
        ({"top_k": 1.5}, "top_k", "invalid_type"),
        ({"min_p": 1.1}, "min_p", "invalid_value"),
        ({"min_p": "0"}, "min_p", "invalid_type"),
        ({"frequency_penalty": 2.1}, "frequency_penalty", "invalid_value"),
        ({"presence_penalty": -2.1}, "presence_penalty", "invalid_value"),
        ({"presence_penalty": "0"}, "presence_penalty", "invalid_type"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"repetition_penalty": 10.1}, "repetition_penalty", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": "1"}}, "logit_bias", "invalid_type"),
        ({"logit_bias": {"five": 1}}, "logit_bias.five", "invalid_value"),
        ({"logit_bias": {"05": 1, "5": 2}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {str(n): 0 for n in range(1025)}}, "logit_bias", "invalid_value"),
        ({"logit_bias": [1]}, "logit_bias", "invalid_type"),
        ({"logprobs": 1}, "logprobs", "invalid_type"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "invalid_value"),
        ({"top_logprobs": 1}, "top_logprobs", "invalid_value"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", "invalid_value"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "invalid_value"),
        ({"stop_token_ids": list(range(129))}, "stop_token_ids", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"seed": 0.5}, "seed", "invalid_type"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
        ({"stop": [""]}, "stop[0]", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "invalid_value"),
        ({"max_tokens": 10, "min_tokens": 11}, "min_tokens", "invalid_value"),
        ({"max_tokens": CONTEXT_TOKENS}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "a" * 500}]}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "a" * 50_000}]}, "messages", "context_length_exceeded"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_type"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"prompt": "a"}, "prompt", "unknown_parameter"),
    ],
)
def test_wrong_values(shared: RunningGateway, change: dict[str, object], param: str, code: str) -> None:
    body = {"model": MODEL, "messages": HI} | change
    assert refused(shared, CHAT, 400, code, json=body)["param"] == param


@pytest.mark.parametrize(
    ("prompt", "param", "code"),
    [
        (5, "prompt", "invalid_type"),
        ("", "prompt", "invalid_value"),
        ([], "prompt", "invalid_value"),
        ([[]], "prompt[0]", "invalid_value"),
        (["a", 5], "prompt[1]", "invalid_type"),
        (["a"] * 33, "prompt", "invalid_value"),
        ([VOCAB_SIZE], "prompt", "invalid_value"),
        ([-1], "prompt[0]", "invalid_value"),
        ([1] * (CONTEXT_TOKENS + 1), "prompt", "context_length_exceeded"),
    ],
)
def test_wrong_prompts(shared: RunningGateway, prompt: object, param: str, code: str) -> None:
    assert refused(shared, TEXT, 400, code, json={"model": MODEL, "prompt": prompt})["param"] == param


@pytest.mark.parametrize(
    ("value", "code"), [(6, "invalid_value"), (-1, "invalid_value"), (True, "invalid_type")]
)
def test_wrong_completion_logprobs(shared: RunningGateway, value: object, code: str) -> None:
    body = {"model": MODEL, "prompt": "a", "logprobs": value}
    assert refused(shared, TEXT, 400, code, json=body)["param"] == "logprobs"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_media_are_refused_with_a_clear_word(shared: RunningGateway, kind: str) -> None:
    part = {"type": kind, kind: {"url": "data:,"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
    error = refused(shared, CHAT, 400, "invalid_value", json={"model": MODEL, "messages": messages})
    assert f"content part of type {kind}" in error["message"]


JSON_TYPE = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b'{"model": NaN}', 400, "invalid_json"),
        (b'{"model": "\xff"}', 400, "invalid_json"),
        (b'{"model": "\\ud800"}', 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", 400, "invalid_json"),
        (b" " * (MAX_BODY_BYTES + 1), 413, "request_too_large"),
    ],
)
def test_broken_bodies(shared: RunningGateway, content: bytes, status: int, code: str) -> None:
    refused(shared, CHAT, status, code, content=content, headers=AUTH | JSON_TYPE)


def test_a_body_without_a_length_is_limited_too(shared: RunningGateway) -> None:
    pieces = iter([b" " * 1_000_000] * 9)
    refused(shared, CHAT, 413, "request_too_large", content=pieces, headers=AUTH | JSON_TYPE)


def test_content_type(shared: RunningGateway) -> None:
    refused(shared, CHAT, 415, "unsupported_media_type", data={"model": MODEL})
    refused(shared, CHAT, 415, "unsupported_media_type", content=b"{}")


def test_unknown_paths_methods_and_models(shared: RunningGateway) -> None:
    refused(shared, "/v1/engines", 404, "unknown_url", method="GET")
    refused(shared, "/docs", 404, "unknown_url", method="GET")
    refused(shared, CHAT, 405, "method_not_supported", method="GET")
    refused(shared, CHAT, 404, "model_not_found", json={"model": "gpt-9", "messages": HI})
    refused(shared, "/v1/models/gpt-9", 404, "model_not_found", method="GET")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": "Bearer sk-pod-wrong"},
        {"authorization": "Bearer " + "x" * 10_000},
        {"authorization": f"Bearer {REVOKED_KEY}"},
    ],
)
def test_keys(shared: RunningGateway, headers: dict[str, str]) -> None:
    """Also from this machine, and before the body is read."""
    for path, method in [("/v1/models", "GET"), (CHAT, "POST"), (TEXT, "POST")]:
        error = refused(shared, path, 401, "invalid_api_key", method=method, headers=headers)
        assert KEY not in error["message"]


@pytest.mark.parametrize(
    ("refusal", "status", "code", "kind"),
    [
        (NoRoute("layers [2:4) of tiny have no live node"), 503, "no_route", openai.InternalServerError),
        (GenerationFailed("stage bo[2:4) refused"), 503, "generation_failed", openai.InternalServerError),
        (QuotaExceeded("alice is past her credit line"), 429, "insufficient_quota", openai.RateLimitError),
        (WaitedTooLong("the pod is busy", 7), 429, "pod_busy", openai.RateLimitError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_node_says_no(
    gateway: RunningGateway,
    refusal: BackendRefusal,
    status: int,
    code: str,
    kind: type[openai.APIStatusError],
    stream: bool,
) -> None:
    gateway.backend.refusal = refusal
    body = {"model": MODEL, "messages": HI, "stream": stream}
    error = refused(gateway, CHAT, status, code, json=body)
    assert error["message"] == str(refusal)
    client = OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0)
    with pytest.raises(kind) as caught:
        client.chat.completions.create(model=MODEL, messages=HI, stream=stream)
    headers = caught.value.response.headers
    assert headers.get("x-should-retry") == ("false" if isinstance(refusal, QuotaExceeded) else None)
    assert headers.get("retry-after") == ("7" if isinstance(refusal, WaitedTooLong) else None)


def test_a_fault_of_ours_is_an_error_object_too(gateway: RunningGateway) -> None:
    gateway.backend.refusal = RuntimeError("a secret detail")
    error = refused(gateway, CHAT, 500, "internal", json={"model": MODEL, "messages": HI})
    assert "secret" not in json.dumps(error)
