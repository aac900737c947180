"""The official client, sync and async, with strict response validation, against the gateway."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from node.gateway.backend import GeneratedToken, QuotaExceeded, WaitedTooLong
from node.links.frames import FinishReason
from tests.gateway.conftest import RunningGateway, wait_until
from tests.gateway.fake_backend import (
    CONTEXT_TOKENS,
    EOS,
    KEY,
    MODEL,
    NARROW_KEY,
    OTHER_MODEL,
    ROUTE,
    Script,
    failing,
    tokens_of,
)
from tests.gateway.openai_schema import check

TEXT = "Hello, wörld 🌍!"
NUM_TOKENS = len(TEXT.encode()) + 1
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(gateway: RunningGateway) -> OpenAI:
    return OpenAI(
        base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0, timeout=10, _strict_response_validation=True
    )


@pytest.fixture
def lines(gateway: RunningGateway):
    """The data of each event of a raw stream, each chunk checked against its schema."""

    def post(path: str, schema: str, **body: object) -> list[object]:
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.stream("POST", gateway.url + path, json=body, headers=headers, timeout=10) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            datas = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
        assert datas[-1] == "[DONE]"
        chunks = [json.loads(data) for data in datas[:-1]]
        for chunk in chunks:
            check(schema, chunk)
        return chunks

    return post


def test_models(client: OpenAI, gateway: RunningGateway) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, OTHER_MODEL]
    assert client.models.retrieve(OTHER_MODEL).id == OTHER_MODEL
    raw = httpx.get(f"{gateway.url}/v1/models", headers={"authorization": f"Bearer {KEY}"}).json()
    check("ListModelsResponse", raw)
    narrow = client.with_options(api_key=NARROW_KEY)
    assert [model.id for model in narrow.models.list()] == [OTHER_MODEL]
    with pytest.raises(openai.PermissionDeniedError):
        narrow.chat.completions.create(model=MODEL, messages=MESSAGES)


def test_chat(client: OpenAI, gateway: RunningGateway) -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES)
    answer = raw.parse()
    check("CreateChatCompletionResponse", json.loads(raw.text))
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == NUM_TOKENS
    assert answer.usage.prompt_tokens == len("<user>Hi<assistant>")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + NUM_TOKENS
    assert raw.headers["x-pod-route"] == ROUTE
    assert raw.headers["x-request-id"] == gateway.backend.generations[0].request.request_id
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert gateway.backend.generations[0].settlements == [NUM_TOKENS]


def test_chat_stream(client: OpenAI, gateway: RunningGateway) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]].count("stop") == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == NUM_TOKENS
    assert len({chunk.id for chunk in chunks}) == 1
    assert gateway.backend.generations[0].settlements == [NUM_TOKENS]


def test_stream_chunks_match_the_schema(lines) -> None:
    chat = lines(
        "/v1/chat/completions",
        "CreateChatCompletionStreamResponse",
        model=MODEL,
        messages=MESSAGES,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert not any("\ufffd" in json.dumps(chunk, ensure_ascii=False) for chunk in chat)
    text = lines("/v1/completions", "CreateCompletionResponse", model=MODEL, prompt="a", stream=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in text) == "Hello, wörld "
    assert not any("usage" in chunk for chunk in text)
    counted = lines(
        "/v1/completions",
        "CreateCompletionResponse",
        model=MODEL,
        prompt="a",
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in counted]
    assert counts == sorted(counts)
    assert counts[-1] == 16


def test_completion(client: OpenAI, gateway: RunningGateway) -> None:
    raw = client.completions.with_raw_response.create(model=MODEL, prompt="Once", max_tokens=5)
    answer = raw.parse()
    check("CreateCompletionResponse", json.loads(raw.text))
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Hello", "length")
    assert gateway.backend.generations[0].request.prompt_ids == tuple(b"Once")
    client.completions.create(model=MODEL, prompt=[1, 2, 3])
    assert gateway.backend.generations[1].request.prompt_ids == (1, 2, 3)
    assert gateway.backend.generations[1].request.sampling.max_num_output_tokens == 16


@pytest.mark.parametrize("prompts", [["one", "three"], [[1, 2, 3], [4, 5, 6, 7, 8]]])
def test_several_prompts_are_several_choices(
    client: OpenAI, gateway: RunningGateway, prompts: list[object]
) -> None:
    gateway.backend.scripts.extend([Script(tokens_of("first")), Script(tokens_of("second"))])
    answer = client.completions.create(model=MODEL, prompt=prompts)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "first"), (1, "second")]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 6 + 7)
    assert [generation.settlements for generation in gateway.backend.generations] == [[6], [7]]


def test_several_prompts_stream_side_by_side(client: OpenAI, gateway: RunningGateway) -> None:
    slow = Script(tokens_of("slow"), pause_at=2)
    gateway.backend.scripts.extend([slow, Script(tokens_of("quick"))])
    texts = {0: "", 1: ""}
    raw = client.completions.with_streaming_response.create(model=MODEL, prompt=["a", "b"], stream=True)
    with raw as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                texts[choice["index"]] += choice["text"]
                if choice["finish_reason"] and choice["index"] == 1:
                    # Only when the second is complete may the first go on.
                    gateway.call(slow.go.set)
    assert texts == {0: "slow", 1: "quick"}


@pytest.mark.parametrize(
    ("stop", "text", "num_tokens"),
    [("wö", "Hello, ", 10), (["zzz", "lo"], "Hel", 5), ("🌍!", "Hello, wörld ", 19)],
)
def test_stop_strings(
    client: OpenAI, gateway: RunningGateway, stop: object, text: str, num_tokens: int
) -> None:
    """The tokens that spell the stop string were generated and count; its text never leaves."""
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, stop=stop)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == num_tokens
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
    assert [generation.settlements for generation in gateway.backend.generations] == [[num_tokens]] * 2
    assert all(generation.closed for generation in gateway.backend.generations)


def test_a_held_back_beginning_of_a_stop_string_is_sent_when_it_was_none(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, stop="!!")
    assert answer.choices[0].message.content == TEXT


def test_sampling_reaches_the_node(client: OpenAI, gateway: RunningGateway) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        max_completion_tokens=30,
        extra_body={"top_k": 40, "ignore_eos": True, "min_tokens": 3},
        user="somebody",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        n=1,
        presence_penalty=0,
        response_format={"type": "text"},
    )
    sampling = gateway.backend.generations[0].request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 40, 7)
    assert (sampling.max_num_output_tokens, sampling.min_num_output_tokens) == (30, 3)
    assert sampling.ignore_eos
    assert sampling.eos_token_ids == (EOS,)
    client.chat.completions.create(model=MODEL, messages=MESSAGES)
    prompt = gateway.backend.generations[1].num_prompt_tokens
    assert gateway.backend.generations[1].request.sampling.max_num_output_tokens == CONTEXT_TOKENS - prompt


def test_stop_strings_wait_for_min_tokens(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stop="l", extra_body={"min_tokens": 5}
    )
    assert answer.choices[0].message.content == "Hello, wör"


def test_messages_become_the_template_s(client: OpenAI, gateway: RunningGateway) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ],
    )
    prompt = bytes(gateway.backend.generations[0].request.prompt_ids).decode()
    assert prompt == "<system>Be brief.<user>a\nb<assistant>c<user>d<assistant>"


def test_a_character_cut_off_by_the_limit_is_not_sent(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=9)
    assert answer.choices[0].message.content == "Hello, w"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 9


def test_an_error_inside_a_stream_is_raised_by_the_client(client: OpenAI, gateway: RunningGateway) -> None:
    gateway.backend.scripts.append(failing("Hel"))
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    heard = []
    with pytest.raises(openai.APIError, match="stage bo") as caught:
        heard.extend(chunk.choices[0].delta.content for chunk in stream)
    assert "".join(heard) == "Hel"
    assert caught.value.code == "generation_failed"
    # The client is told first: settling with a dead stage may take a while.
    wait_until("settled", lambda: gateway.backend.generations[0].settlements == [3])


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_is_a_503(
    client: OpenAI, gateway: RunningGateway, stream: bool
) -> None:
    gateway.backend.scripts.append(failing(""))
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream)
    assert (caught.value.status_code, caught.value.code) == (503, "generation_failed")
    assert gateway.backend.generations[0].settlements == [0]


def test_when_one_of_several_prompts_fails_all_are_settled(client: OpenAI, gateway: RunningGateway) -> None:
    """At nothing: no part of the answer leaves."""
    gateway.backend.scripts.extend([Script(tokens_of("never"), pause_at=2), failing("x")])
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model=MODEL, prompt=["a", "b"])
    first, second = gateway.backend.generations
    assert (first.settlements, second.settlements) == ([0], [0])
    assert first.closed


def test_more_prompts_than_there_are_places(client: OpenAI, gateway: RunningGateway) -> None:
    """What has ended makes room for what waits, streamed or not, and the usage of all is told."""
    gateway.backend.places = asyncio.Semaphore(2)
    prompts = ["a", "b", "c", "d", "e"]
    for number in range(10):
        gateway.backend.scripts.append(Script(tokens_of(f"text {number % 5}"), is_paced=True))
    answer = client.completions.create(model=MODEL, prompt=prompts)
    assert [choice.text for choice in answer.choices] == [f"text {number}" for number in range(5)]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 5 * 7)
    texts = [""] * 5
    options = {"include_usage": True}
    raw = client.completions.with_streaming_response.create(
        model=MODEL, prompt=prompts, stream=True, stream_options=options
    )
    with raw as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    *chunks, last = map(json.loads, lines)
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == [f"text {number}" for number in range(5)]
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (5, 5 * 7)
    assert [generation.settlements for generation in gateway.backend.generations] == [[7]] * 10


@pytest.mark.parametrize("stream", [False, True])
def test_a_later_prompt_that_is_refused_before_the_first_byte_is_a_plain_status(
    client: OpenAI, gateway: RunningGateway, stream: bool
) -> None:
    refused = Script(refusal=QuotaExceeded("past its credit line"))
    gateway.backend.scripts.extend([Script(pause_at=0), refused])
    with pytest.raises(openai.RateLimitError, match="past its credit line"):
        client.completions.create(model=MODEL, prompt=["a", "b"], stream=stream)
    assert [generation.settlements for generation in gateway.backend.generations] == [[0]]


def test_a_prompt_that_waited_too_long_waits_for_the_others_of_its_request(
    client: OpenAI, gateway: RunningGateway
) -> None:
    busy = Script(refusal=WaitedTooLong("the pod is busy", 5))
    gateway.backend.scripts.extend(
        [Script(tokens_of("first"), is_paced=True), busy, Script(tokens_of("second")), busy]
    )
    answer = client.completions.create(model=MODEL, prompt=["a", "b"])
    assert [choice.text for choice in answer.choices] == ["first", "second"]
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model=MODEL, prompt=["a", "b"])


def test_async_client(gateway: RunningGateway) -> None:
    async def ask() -> tuple[str, str | None]:
        async with AsyncOpenAI(
            base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0, _strict_response_validation=True
        ) as client:
            stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
            return text, answer.choices[0].message.content

    assert asyncio.run(ask()) == (TEXT, TEXT)


def test_many_at_once(gateway: RunningGateway) -> None:
    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as client:

            async def ask() -> str:
                stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(ask() for _ in range(40)))

    assert asyncio.run(ask_all()) == [TEXT] * 40
    assert [g.settlements for g in gateway.backend.generations] == [[NUM_TOKENS]] * 40


def test_a_route_cannot_write_headers(client: OpenAI, gateway: RunningGateway) -> None:
    """Node names are other members' words."""
    script = Script([GeneratedToken(EOS, FinishReason.STOP)])
    gateway.backend.scripts.append(script)
    gateway.backend.route_text = "ådå\r\nset-cookie: x[0:4)"
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES)
    assert raw.headers["x-pod-route"] == "?d???set-cookie: x[0:4)"
    assert "set-cookie" not in raw.headers
