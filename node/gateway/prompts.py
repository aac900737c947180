"""Prompts to token ids, and the check that prompt and answer fit the model's context.

Knows the tokenizer's port and the model's card; nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from jinja2 import TemplateError

from node.gateway.backend import GenerationRequest, ModelCard, TextTokenizer
from node.gateway.errors import ApiError, bad_parameter
from node.gateway.parameters import ChatMessage, ChatParameters, GenerationParameters

# Longer texts are tokenized off the event loop, where they would hold up every running stream.
MAX_NUM_CHARS_ON_LOOP = 16_384


async def chat_prompt(tokenizer: TextTokenizer, messages: Sequence[ChatMessage]) -> list[int]:
    """Token ids of a conversation, up to where the assistant answers."""
    turns = [message.for_template() for message in messages]
    try:
        if sum(len(turn["content"]) for turn in turns) + 64 * len(turns) <= MAX_NUM_CHARS_ON_LOOP:
            return tokenizer.apply_chat_template(turns)
        return await asyncio.to_thread(tokenizer.apply_chat_template, turns)
    except (ValueError, TemplateError) as error:
        message = f"The model's chat template refuses these messages: {error}"
        raise bad_parameter("messages", message) from None


async def text_prompt(tokenizer: TextTokenizer, prompt: str | list[int], card: ModelCard) -> list[int]:
    """Token ids of one completion prompt; ids are checked against the vocabulary."""
    if isinstance(prompt, str):
        if len(prompt) <= MAX_NUM_CHARS_ON_LOOP:
            return tokenizer.encode(prompt)
        return await asyncio.to_thread(tokenizer.encode, prompt)
    if max(prompt) >= card.vocab_size:
        message = f"Token id {max(prompt)} is outside the model's vocabulary of {card.vocab_size}."
        raise bad_parameter("prompt", message)
    return prompt


def generation_request(
    parameters: GenerationParameters,
    prompt_ids: Sequence[int],
    card: ModelCard,
    eos_token_ids: tuple[int, ...],
    default_max_num_tokens: int | None,
    request_id: str,
) -> GenerationRequest:
    """The request for the node; without any limit the answer may fill the context."""
    where = "messages" if isinstance(parameters, ChatParameters) else "prompt"
    if not prompt_ids:
        raise bad_parameter(where, "The prompt has no token to start from.")
    room = card.max_context_tokens - len(prompt_ids)
    asked = parameters.max_num_output_tokens
    if room < (asked or 1):
        raise _context_exceeded(where, card, len(prompt_ids), asked)
    num_output_tokens = asked or min(room, default_max_num_tokens or room)
    if (parameters.min_tokens or 0) > num_output_tokens:
        raise bad_parameter("min_tokens", f"min_tokens is above the limit of {num_output_tokens} tokens.")
    _check_vocabulary(parameters, card)
    sampling = parameters.sampling(num_output_tokens, eos_token_ids)
    return GenerationRequest(card.name, tuple(prompt_ids), sampling, request_id)


def _check_vocabulary(parameters: GenerationParameters, card: ModelCard) -> None:
    named = {
        "logit_bias": [token_id for token_id, _ in parameters.biases],
        "stop_token_ids": parameters.stop_token_ids or [],
    }
    for where, ids in named.items():
        if max(ids, default=0) >= card.vocab_size:
            message = f"Token id {max(ids)} is outside the model's vocabulary of {card.vocab_size}."
            raise bad_parameter(where, message)


def _context_exceeded(where: str, card: ModelCard, num_prompt_tokens: int, asked: int | None) -> ApiError:
    wanted = f"{num_prompt_tokens} in the {where}"
    if asked is not None:
        wanted = f"{num_prompt_tokens + asked} ({wanted}, {asked} in the completion)"
    message = (
        f"This model's maximum context length is {card.max_context_tokens} tokens; you asked for {wanted}."
    )
    return bad_parameter(where, message, "context_length_exceeded")
