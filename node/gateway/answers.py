"""The shapes of answers: chat and text completions, whole and in chunks, as the OpenAI API spells them.

Pure: values in, JSON-ready dictionaries out. Knows no HTTP and no generation.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from node.gateway.backend import Usage
from node.gateway.delivery import FinishName, TextPiece
from node.gateway.token_logprobs import TokenLogprobs, chat_logprobs, completion_logprobs

Json = dict[str, object]


@dataclass(slots=True)
class Choice:
    """A whole answer as it grows."""

    text: str = ""
    finish: FinishName | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, piece: TextPiece) -> None:
        self.text += piece.text
        self.finish = piece.finish
        self.logprobs += piece.logprobs


class AnswerShape(Protocol):
    """How one endpoint words the same generation."""

    def opening_chunks(self) -> list[Json]: ...

    def chunks(self, index: int, piece: TextPiece) -> list[Json]: ...

    def usage_chunk(self) -> Json: ...

    def whole(self, choices: Sequence[Choice]) -> Json: ...


def usage_object(num_prompt_tokens: int, num_output_tokens: int, num_cached_tokens: int) -> Json:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }


def total_usage(usages: Sequence[Usage]) -> Json:
    return usage_object(
        sum(usage.num_prompt_tokens for usage in usages),
        sum(usage.num_output_tokens for usage in usages),
        sum(usage.num_cached_tokens for usage in usages),
    )


@dataclass(frozen=True, slots=True)
class ChatShape:
    model: str
    has_logprobs: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(16)}")
    created_s: int = field(default_factory=lambda: int(time.time()))

    def opening_chunks(self) -> list[Json]:
        return [self._chunk({"role": "assistant", "content": "", "refusal": None}, None)]

    def chunks(self, index: int, piece: TextPiece) -> list[Json]:
        logprobs = chat_logprobs(piece.logprobs) if piece.logprobs else None
        text = [self._chunk({"content": piece.text}, None, logprobs)] if piece.text or logprobs else []
        return text + ([self._chunk({}, piece.finish)] if piece.finish else [])

    def usage_chunk(self) -> Json:
        return self._head("chat.completion.chunk") | {"choices": []}

    def whole(self, choices: Sequence[Choice]) -> Json:
        listed = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": chat_logprobs(choice.logprobs) if self.has_logprobs else None,
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(choices)
        ]
        return self._head("chat.completion") | {"choices": listed}

    def _chunk(self, delta: Json, finish: FinishName | None, logprobs: Json | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created_s, "model": self.model}


@dataclass(frozen=True, slots=True)
class CompletionShape:
    model: str
    has_logprobs: bool = False
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(16)}")
    created_s: int = field(default_factory=lambda: int(time.time()))

    def opening_chunks(self) -> list[Json]:
        return []

    def chunks(self, index: int, piece: TextPiece) -> list[Json]:
        return [self._answer([self._choice(index, piece)])]

    def usage_chunk(self) -> Json:
        return self._answer([])

    def whole(self, choices: Sequence[Choice]) -> Json:
        return self._answer([self._choice(index, choice) for index, choice in enumerate(choices)])

    def _choice(self, index: int, part: TextPiece | Choice) -> Json:
        logprobs = completion_logprobs(part.logprobs) if self.has_logprobs else None
        return {"index": index, "text": part.text, "logprobs": logprobs, "finish_reason": part.finish}

    def _answer(self, choices: list[Json]) -> Json:
        head: Json = {"id": self.id, "object": "text_completion", "created": self.created_s}
        return head | {"model": self.model, "choices": choices}
