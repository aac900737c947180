"""What a client with a limited key sees: OpenAI's headers on every answer, refusals it understands."""

from __future__ import annotations

import httpx
import openai
import pytest
from openai import OpenAI

from node.gateway.backend import KeyRefused, QuotaExceeded, RateLimit, RateLimited
from node.gateway.rate_headers import duration_text
from tests.gateway.conftest import RunningGateway
from tests.gateway.fake_backend import (
    KEY,
    LIMITED_KEY,
    LIMITED_TOKENS,
    MODEL,
    NARROW_KEY,
    OTHER_MODEL,
    REVOKED_KEY,
    Script,
    tokens_of,
)

HI = [{"role": "user", "content": "Hi"}]
LIMITS = (RateLimit("requests", 30, 28, 59_500), RateLimit("tokens", 20_000, 0, 60_000))
HEADERS = {
    "x-ratelimit-limit-requests": "30",
    "x-ratelimit-remaining-requests": "28",
    "x-ratelimit-reset-requests": "59.5s",
    "x-ratelimit-limit-tokens": "20000",
    "x-ratelimit-remaining-tokens": "0",
    "x-ratelimit-reset-tokens": "1m0s",
}


@pytest.fixture
def client(gateway: RunningGateway) -> OpenAI:
    return OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0, timeout=10)


def rate_headers(headers: httpx.Headers) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith("x-ratelimit-")}


@pytest.mark.parametrize("stream", [False, True])
def test_answers_and_streams_say_how_the_limits_stand(
    gateway: RunningGateway, client: OpenAI, stream: bool
) -> None:
    gateway.backend.limits = LIMITS
    with client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=HI, stream=stream
    ) as response:
        assert rate_headers(response.headers) == HEADERS
        response.read()


def test_lists_and_refusals_say_it_too(gateway: RunningGateway, client: OpenAI) -> None:
    gateway.backend.limits = LIMITS
    assert rate_headers(client.models.with_raw_response.list().headers) == HEADERS
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=HI)
    assert rate_headers(caught.value.response.headers) == HEADERS
    with pytest.raises(openai.BadRequestError) as caught_bad:
        client.chat.completions.create(model=MODEL, messages=HI, temperature=9)
    assert rate_headers(caught_bad.value.response.headers) == HEADERS


def test_headers_are_of_the_moment_the_answer_begins(gateway: RunningGateway, client: OpenAI) -> None:
    """So that they count the request they answer."""
    script = Script(pause_at=0)
    gateway.backend.scripts.append(script)
    gateway.backend.limits = LIMITS
    later = (RateLimit("requests", 30, 27, 1000),)

    def go() -> None:
        gateway.backend.limits = later
        script.go.set()

    gateway.loop.call_soon_threadsafe(gateway.loop.call_later, 0.1, go)
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HI)
    assert raw.headers["x-ratelimit-remaining-requests"] == "27"
    assert raw.headers["x-ratelimit-reset-requests"] == "1s"


def test_keys_without_limits_and_strangers_get_no_such_headers(
    gateway: RunningGateway, client: OpenAI
) -> None:
    assert rate_headers(client.models.with_raw_response.list().headers) == {}
    gateway.backend.limits = LIMITS
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key=REVOKED_KEY).models.list()
    assert rate_headers(caught.value.response.headers) == {}


def test_a_limit_per_minute_says_when_to_come_back_and_the_client_does(
    gateway: RunningGateway, client: OpenAI
) -> None:
    gateway.backend.refusal = RateLimited("This API key may use 2 requests per minute.", "requests", 1)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model=MODEL, messages=HI)
    assert caught.value.response.headers["retry-after"] == "1"
    assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "requests")

    def forgive() -> None:
        gateway.backend.refusal = None

    gateway.loop.call_soon_threadsafe(gateway.loop.call_later, 0.5, forgive)
    patient = client.with_options(max_retries=1)
    assert patient.chat.completions.create(model=MODEL, messages=HI).choices


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (RateLimited("it may use 9000 of 100 tokens", "tokens", None), "rate_limit_exceeded"),
        (QuotaExceeded("This API key may spend 1.000000 credits"), "insufficient_quota"),
    ],
)
def test_what_waiting_does_not_help_is_not_tried_again(
    gateway: RunningGateway, client: OpenAI, refusal: Exception, code: str
) -> None:
    gateway.backend.refusal = refusal
    tries: list[str] = []
    with httpx.Client(event_hooks={"request": [lambda request: tries.append(request.url.path)]}) as counting:
        stubborn = client.with_options(max_retries=5, http_client=counting)
        with pytest.raises(openai.RateLimitError) as caught:
            stubborn.chat.completions.create(model=MODEL, messages=HI)
    assert tries == ["/v1/chat/completions"]
    assert caught.value.code == code
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert "retry-after" not in caught.value.response.headers


def test_an_answer_without_a_limit_of_its_own_stays_within_the_key_s_minute(
    gateway: RunningGateway, client: OpenAI
) -> None:
    """Else no request without max_tokens would ever fit a key whose minute is smaller than the context."""
    limited = client.with_options(api_key=LIMITED_KEY)
    prompt = len("<user>Hi<assistant>")
    limited.chat.completions.create(model=MODEL, messages=HI)
    limited.chat.completions.create(model=MODEL, messages=HI, max_tokens=7)
    limited.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * 100}])
    limited.completions.create(model=MODEL, prompt="Hi")
    asked = [one.request.sampling.max_num_output_tokens for one in gateway.backend.generations]
    assert asked == [LIMITED_TOKENS - prompt, 7, 1, 16]


def test_a_model_outside_the_key_s_scope_is_forbidden(client: OpenAI) -> None:
    narrow = client.with_options(api_key=NARROW_KEY)
    assert [card.id for card in narrow.models.list()] == [OTHER_MODEL]
    for ask in (
        lambda: narrow.models.retrieve(MODEL),
        lambda: narrow.chat.completions.create(model=MODEL, messages=HI),
        lambda: narrow.completions.create(model=MODEL, prompt="Hi"),
    ):
        with pytest.raises(openai.PermissionDeniedError) as caught:
            ask()
        assert caught.value.code == "model_not_allowed"


def test_a_key_revoked_in_the_middle_of_a_stream_ends_it_with_the_reason(
    gateway: RunningGateway, client: OpenAI
) -> None:
    refusal = KeyRefused("the API key was revoked")
    gateway.backend.scripts.append(Script(tokens_of("abc")[:-1], error=refusal))
    chunks = client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    # The first says the role; then a byte each.
    texts = [next(chunks).choices[0].delta.content for _ in range(4)]
    assert texts == ["", "a", "b", "c"]
    with pytest.raises(openai.APIError, match="was revoked") as caught:
        next(chunks)
    assert caught.value.code == "invalid_api_key"
    (generation,) = gateway.backend.generations
    assert generation.settlements == [3]
    gateway.backend.scripts.append(Script(tokens_of("abc")[:-1], error=refusal))
    with pytest.raises(openai.AuthenticationError):
        client.chat.completions.create(model=MODEL, messages=HI)


@pytest.mark.parametrize(
    ("duration_ms", "text"),
    [(0, "0s"), (120, "120ms"), (1000, "1s"), (7500, "7.5s"), (59_999, "59.999s"), (60_000, "1m0s")],
)
def test_durations_read_as_the_original_writes_them(duration_ms: int, text: str) -> None:
    assert duration_text(duration_ms) == text
