"""Sampling parameters on their way to the node, and logprobs on theirs to the client."""

from __future__ import annotations

import json
import math

import httpx
import pytest
from openai import OpenAI

from node.links.frames import FinishReason
from tests.gateway.conftest import RunningGateway
from tests.gateway.fake_backend import EOS, KEY, MODEL, Script, tokens_of
from tests.gateway.openai_schema import check

MESSAGES = [{"role": "user", "content": "Hi"}]
HALF = -math.log(2)


@pytest.fixture
def client(gateway: RunningGateway) -> OpenAI:
    return OpenAI(
        base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0, timeout=10, _strict_response_validation=True
    )


def chunks_of(gateway: RunningGateway, path: str, schema: str, **body: object) -> list[dict]:
    """The chunks of a raw stream, each checked against its schema."""
    headers = {"authorization": f"Bearer {KEY}"}
    response = httpx.post(gateway.url + path, json=body | {"stream": True}, headers=headers, timeout=10)
    datas = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert datas[-1] == "[DONE]"
    chunks = [json.loads(data) for data in datas[:-1]]
    for chunk in chunks:
        check(schema, chunk)
    return chunks


def test_every_parameter_reaches_the_node(client: OpenAI, gateway: RunningGateway) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        frequency_penalty=0.5,
        presence_penalty=-1,
        logit_bias={"5": -100, "0": 2.5},
        logprobs=True,
        top_logprobs=3,
        seed=-1,
        extra_body={"min_p": 0.1, "top_k": 5, "repetition_penalty": 1.1, "stop_token_ids": [7, 9]},
    )
    sampling = gateway.backend.generations[0].request.sampling
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -1.0)
    assert (sampling.repetition_penalty, sampling.min_p, sampling.top_k) == (1.1, 0.1, 5)
    assert sampling.logit_bias == ((5, -100.0), (0, 2.5))
    assert sampling.num_top_logprobs == 3
    assert sampling.seed == 2**63 - 1
    assert sampling.eos_token_ids == (EOS, 7, 9)


def test_nothing_asked_for_is_nothing_changed(client: OpenAI, gateway: RunningGateway) -> None:
    client.chat.completions.create(model=MODEL, messages=MESSAGES)
    off = {
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "logit_bias": {},
        "logprobs": False,
        "top_logprobs": 0,
    }
    extra = {"min_p": 0, "top_k": -1, "repetition_penalty": 1, "stop_token_ids": []}
    client.chat.completions.create(model=MODEL, messages=MESSAGES, **off, extra_body=extra)
    client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body=dict.fromkeys({**off, **extra}))
    client.completions.create(model=MODEL, prompt="a", extra_body={"logprobs": None})
    for generation in gateway.backend.generations:
        sampling = generation.request.sampling
        assert not sampling.has_penalties
        assert (sampling.min_p, sampling.top_k, sampling.logit_bias) == (0.0, 0, ())
        assert sampling.num_top_logprobs == -1


def test_own_stop_tokens_stop_also_where_the_model_s_end_does_not(
    client: OpenAI, gateway: RunningGateway
) -> None:
    extra = {"stop_token_ids": [7], "ignore_eos": True}
    client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body=extra)
    sampling = gateway.backend.generations[0].request.sampling
    assert (sampling.eos_token_ids, sampling.ignore_eos) == ((7,), False)


def test_chat_logprobs(client: OpenAI, gateway: RunningGateway) -> None:
    gateway.backend.scripts.append(Script(tokens_of("hö")))
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2
    )
    check("CreateChatCompletionResponse", json.loads(raw.text))
    logprobs = raw.parse().choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [token.token for token in logprobs.content] == ["h", "\\xc3", "\\xb6"]
    assert bytes(byte for token in logprobs.content for byte in token.bytes or []).decode() == "hö"
    assert {token.logprob for token in logprobs.content} == {HALF}
    top = logprobs.content[0].top_logprobs
    assert [(one.token, one.bytes, one.logprob) for one in top] == [
        ("h", [104], HALF),
        ("g", [103], 2 * HALF),
    ]


def test_streamed_chat_logprobs_are_the_same(client: OpenAI, gateway: RunningGateway) -> None:
    """Also of tokens whose text is held back: they come with the next text, or the end."""
    request = {"model": MODEL, "messages": MESSAGES, "logprobs": True, "top_logprobs": 1, "stop": ["lo,"]}
    whole = client.chat.completions.create(**request).choices[0]
    path, schema = "/v1/chat/completions", "CreateChatCompletionStreamResponse"
    chunks = chunks_of(gateway, path, schema, **request)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    streamed = [token for part in parts if part for token in part["content"]]
    assert whole.logprobs is not None
    assert whole.logprobs.content is not None
    assert streamed == [token.model_dump() for token in whole.logprobs.content]
    assert "".join(token["token"] for token in streamed) == "Hello,"
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole.message.content == "Hel"


def test_logprobs_without_alternatives_and_of_an_empty_answer(
    client: OpenAI, gateway: RunningGateway
) -> None:
    gateway.backend.scripts.extend([Script(tokens_of("a")), Script(tokens_of(""))])
    for expected in ([("a", [])], []):
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert [(token.token, token.top_logprobs) for token in logprobs.content or []] == expected
    plain = client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert plain.choices[0].logprobs is None


def test_completion_logprobs(client: OpenAI, gateway: RunningGateway) -> None:
    gateway.backend.scripts.extend(Script(tokens_of("aöb", FinishReason.STOP)) for _ in range(3))
    raw = client.completions.with_raw_response.create(model=MODEL, prompt="x", logprobs=2)
    check("CreateCompletionResponse", json.loads(raw.text))
    logprobs = raw.parse().choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "\\xc3", "\\xb6", "b"]
    # Where the text of the token begins; the two halves of the one letter both at its place.
    assert logprobs.text_offset == [0, 1, 1, 2]
    assert logprobs.token_logprobs == [HALF] * 4
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"a": HALF, "`": 2 * HALF}
    chunks = chunks_of(
        gateway, "/v1/completions", "CreateCompletionResponse", model=MODEL, prompt="x", logprobs=2
    )
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for name, expected in logprobs.model_dump().items():
        assert [item for part in parts for item in part[name]] == expected
    none_but_the_picked = client.completions.create(model=MODEL, prompt="x", logprobs=0)
    assert none_but_the_picked.choices[0].logprobs is not None
    assert none_but_the_picked.choices[0].logprobs.top_logprobs is not None
    assert none_but_the_picked.choices[0].logprobs.top_logprobs[0] == {"a": HALF}
