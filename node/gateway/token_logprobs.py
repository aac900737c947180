"""Log-probabilities of an answer's tokens, with the tokens spelled out, in the two shapes of the OpenAI API.

Pure, but for the tokenizer that spells. A token need not be whole characters: `bytes` is then the only exact
spelling, and the text shows the odd bytes as `\\xNN`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from node.gateway.backend import GeneratedToken, TextTokenizer

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class SpelledToken:
    raw: bytes
    logprob: float

    @property
    def text(self) -> str:
        return self.raw.decode("utf-8", "backslashreplace")

    def chat(self) -> Json:
        return {"token": self.text, "logprob": self.logprob, "bytes": list(self.raw)}


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token of the answer and its likeliest alternatives. It begins at character `offset` of the text."""

    token: SpelledToken
    top: tuple[SpelledToken, ...]
    offset: int

    @classmethod
    def of(cls, token: GeneratedToken, tokenizer: TextTokenizer, offset: int) -> TokenLogprobs:
        assert token.logprob is not None
        top = tuple(SpelledToken(tokenizer.token_bytes(id_), logprob) for id_, logprob in token.top_logprobs)
        return cls(SpelledToken(tokenizer.token_bytes(token.token_id), token.logprob), top, offset)


def chat_logprobs(tokens: Sequence[TokenLogprobs]) -> Json:
    content = [item.token.chat() | {"top_logprobs": [one.chat() for one in item.top]} for item in tokens]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[TokenLogprobs]) -> Json:
    """The picked token is always among its `top_logprobs`, which so may be one more than were asked for."""
    tops: list[dict[str, float]] = []
    for item in tokens:
        top: dict[str, float] = {}
        for one in (*item.top, item.token):
            top.setdefault(one.text, one.logprob)
        tops.append(top)
    return {
        "tokens": [item.token.text for item in tokens],
        "token_logprobs": [item.token.logprob for item in tokens],
        "top_logprobs": tops,
        "text_offset": [item.offset for item in tokens],
    }
