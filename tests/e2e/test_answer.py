"""Every node answers for the whole pod, to clients we did not write."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.e2e.conftest import MODEL, LocalPod

pytestmark = pytest.mark.processes

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


@pytest.mark.parametrize("index", [0, 1, 2])
def test_each_node_answers_with_one_key(pod: LocalPod, index: int) -> None:
    client = pod.client(index, _strict_response_validation=True)
    assert [card.id for card in client.models.list()] == [MODEL]
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=32
    )
    completion = raw.parse()
    assert completion.choices[0].message.content == ANSWER
    assert completion.choices[0].finish_reason == "stop"
    names = [part.split("[")[0] for part in raw.headers["x-pod-route"].split(",")]
    assert len(set(names)) == 3


@pytest.mark.parametrize("index", [0, 1, 2])
def test_each_node_streams(pod: LocalPod, index: int) -> None:
    chunks = list(
        pod.client(index, _strict_response_validation=True).chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            temperature=0,
            max_tokens=32,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == ANSWER
    assert chunks[-1].usage is not None
    whole = pod.client(index).chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=32
    )
    assert chunks[-1].usage == whole.usage


def test_requests_at_once_do_not_change_each_other(pod: LocalPod) -> None:
    prompts = [f"Count from {n} to {n + 5}:" for n in range(6)]

    async def ask(index: int, prompt: str) -> str:
        async with AsyncOpenAI(
            base_url=f"{pod.nodes[index].api_url}/v1", api_key=pod.key, max_retries=0, timeout=120
        ) as client:
            done = await client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=24)
            return done.choices[0].text

    async def all_at_once() -> list[str]:
        return await asyncio.gather(*(ask(n % 3, prompt) for n, prompt in enumerate(prompts)))

    alone = [asyncio.run(ask(0, prompt)) for prompt in prompts]
    assert asyncio.run(all_at_once()) == alone


def test_a_seed_gives_the_same_text_at_every_node(pod: LocalPod) -> None:
    texts = {
        pod.client(index)
        .completions.create(
            model=MODEL, prompt="Once upon a time", temperature=1.2, top_p=0.9, seed=7, max_tokens=24
        )
        .choices[0]
        .text
        for index in range(3)
    }
    assert len(texts) == 1


def test_logprobs_and_penalties_go_through_three_nodes(pod: LocalPod) -> None:
    client = pod.client(1, _strict_response_validation=True)
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=32, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    tokens = logprobs.content or []
    text = answer.choices[0].message.content
    assert bytes(byte for token in tokens for byte in token.bytes or []).decode() == text
    assert all(token.top_logprobs[0].token == token.token for token in tokens)
    assert all(token.top_logprobs[0].logprob == token.logprob <= 0 for token in tokens)
    request = {"model": MODEL, "prompt": "one one one one one one one", "temperature": 0, "max_tokens": 8}
    plain = client.completions.create(**request).choices[0].text
    varied = client.completions.create(**request, extra_body={"repetition_penalty": 5}).choices[0].text
    assert varied != plain


def test_a_long_prompt_is_prefilled_in_chunks(pod: LocalPod) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 120
    done = pod.client(1).completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=8)
    assert done.usage is not None
    assert done.usage.prompt_tokens > 1000
    assert "fox" in done.choices[0].text or "quick" in done.choices[0].text


def test_a_wrong_key_is_an_openai_error(pod: LocalPod) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        pod.client(2, key="sk-pod-wrong").models.list()
    assert refused.value.code == "invalid_api_key"
    curl = subprocess.run(
        [
            "curl",
            "-s",
            "-w",
            "\n%{http_code}",
            "-H",
            "authorization: Bearer nope",
            f"{pod.nodes[0].api_url}/v1/models",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    body, status = curl.stdout.rsplit("\n", 1)
    assert status == "401"
    assert json.loads(body)["error"]["code"] == "invalid_api_key"


def test_a_revoked_key_stops_working_at_every_node(pod: LocalPod) -> None:
    made = pod.nodes[1].pod("key", "create", "--name", "short-lived")
    for index in range(3):
        pod.client(index, key=made["key"]).models.list()
    pod.nodes[1].pod("key", "revoke", made["key_id"])
    from tests.e2e.conftest import wait_until

    def refused_everywhere() -> bool:
        return all(
            httpx.get(
                f"{n.api_url}/v1/models", headers={"authorization": f"Bearer {made['key']}"}
            ).status_code
            == 401
            for n in pod.nodes
        )

    wait_until("the revoked key refused everywhere", refused_everywhere, 5)


def test_pod_chat_answers_in_the_terminal(pod: LocalPod) -> None:
    node = pod.nodes[2]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "node",
            "chat",
            MODEL,
            "--message",
            "What is the capital of France?",
            "--temperature",
            "0",
        ],
        env=node.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "tokens/s" in done.stderr


def test_status_says_how_fast_it_is_and_where_the_time_went(pod: LocalPod) -> None:
    node = pod.nodes[1]
    text = pod.client(1).completions.create(model=MODEL, prompt="One, two,", temperature=0, max_tokens=16)
    assert text.usage is not None
    status = node.pod("status")
    row = next(row for row in status["models"] if row["name"] == MODEL)
    assert row["tokens_per_s"] > 0
    assert row["predicted_tokens_per_s"] > 0
    newest = status["recent_requests"][0]
    assert newest["num_output_tokens"] == text.usage.completion_tokens
    times = row["time_per_token"]
    assert [f"{s['node']}[{s['start_layer']}:{s['end_layer']})" for s in times["stages"]] == row[
        "route"
    ].split(",")
    assert all(stage["compute_us"] > 0 and stage["link_us"] > 0 for stage in times["stages"])
    parts_us = sum(stage["total_us"] for stage in times["stages"]) + times["head_and_links_us"]
    assert parts_us >= times["total_us"] - 1
    shown = subprocess.run(
        [sys.executable, "-m", "node", "status"],
        env=node.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "head and links" in shown.stdout
    metrics = httpx.get(f"{node.api_url}/metrics").text
    assert metrics.count("pod_stage_compute_seconds_sum{") >= 3
