"""`pod chat`: a conversation in the terminal, through the same API that every other tool uses."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from openai import APIError, DefaultHttpxClient, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from node.cli import show
from node.cli.call import require_pod, this_home
from node.errors import UserError

READ_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How to answer; `max_num_tokens` bounds one answer."""

    temperature: float
    max_num_tokens: int
    as_json: bool


def chat(model: str | None, message: str | None, options: ChatOptions) -> None:
    """One answer when `message` is given (or standard input is no terminal), else a conversation."""
    home = this_home()
    require_pod(home)
    running = home.running_node()
    if running is None:
        raise UserError("this machine's node is not running; say `pod up` first")
    client = OpenAI(
        base_url=f"{running.local_url}/v1",
        api_key=running.local_token,
        max_retries=0,
        timeout=READ_TIMEOUT_S,
        # A proxy meant for the internet must not be given this machine's token.
        http_client=DefaultHttpxClient(trust_env=False),
    )
    name = model or _first_model(client)
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().strip()
    if message is not None:
        if not message:
            raise UserError("there is no message to send")
        _answer(client, name, [{"role": "user", "content": message}], options)
        return
    _converse(client, name, options)


def _first_model(client: OpenAI) -> str:
    try:
        names = [card.id for card in client.models.list()]
    except APIError as error:
        raise UserError(_reason(error)) from None
    if not names:
        raise UserError("the pod serves no model yet; say `pod model add smollm2-135m`")
    return names[0]


def _converse(client: OpenAI, model: str, options: ChatOptions) -> None:
    show.err.print(f"{model}. An empty line or Ctrl-D ends the conversation.", style="dim")
    messages: list[ChatCompletionMessageParam] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        messages.append({"role": "user", "content": line})
        try:
            answer = _answer(client, model, messages, options)
        except UserError as error:
            show.err.print(f"pod: {error}", markup=False)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def _answer(
    client: OpenAI, model: str, messages: list[ChatCompletionMessageParam], options: ChatOptions
) -> str:
    """Stream one answer; returns its text."""
    began_s, text = time.monotonic(), ""
    num_prompt_tokens = num_output_tokens = 0
    try:
        with client.chat.completions.create(
            model=model,
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            temperature=options.temperature,
            max_tokens=options.max_num_tokens,
        ) as stream:
            for chunk in stream:
                for choice in chunk.choices:
                    piece = choice.delta.content or ""
                    text += piece
                    if not options.as_json:
                        print(piece, end="", flush=True)
                if chunk.usage is not None:
                    num_prompt_tokens = chunk.usage.prompt_tokens
                    num_output_tokens = chunk.usage.completion_tokens
            route = stream.response.headers.get("x-pod-route", "")
    except APIError as error:
        if text and not options.as_json:
            print()
        raise UserError(_reason(error)) from None
    seconds = time.monotonic() - began_s
    if options.as_json:
        usage = {"num_prompt_tokens": num_prompt_tokens, "num_output_tokens": num_output_tokens}
        show.print_json({"model": model, "text": text, "route": route, "seconds": round(seconds, 3), **usage})
        return text
    print()
    show.err.print(
        f"{num_output_tokens} tokens, {num_output_tokens / seconds:.1f} tokens/s, {route}",
        style="dim",
        markup=False,
    )
    return text


def _reason(error: APIError) -> str:
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return str(body["message"])
    return error.message
