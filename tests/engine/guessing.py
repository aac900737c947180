"""Rings whose sessions may guess, and guesses that are as good or bad as a test wants them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from node.engine.draft_odds import DraftOdds
from node.engine.speculation import PassCosts, Speculation
from node.links.frames import MAX_NUM_DRAFT_TOKENS, OpenSession, Sampling
from tests.engine.ring import GREEDY, Ring
from tests.engine.tiny import VOCAB_SIZE


class GuessingRing(Ring):
    max_num_draft_tokens = MAX_NUM_DRAFT_TOKENS

    def opening(self, prompt_ids: Sequence[int], sampling: Sampling = GREEDY) -> OpenSession:
        opening = super().opening(prompt_ids, sampling)
        return replace(opening, max_num_draft_tokens=self.max_num_draft_tokens)


def always_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it costs."""
    monkeypatch.setattr(DraftOdds, "num_to_try", lambda _, at, price, max_num: max_num)


def guess_from(monkeypatch: pytest.MonkeyPatch, texts: Sequence[Sequence[int]]) -> list[int]:
    """Guesses begin as one of `texts` goes on, for a random number of tokens, and then are wrong.

    Returns how many guesses were made, a number for each step that had any, as they are made.
    """
    rng = random.Random(17)
    nums: list[int] = []
    tokens_came = Speculation.tokens_came

    def came(self: Speculation, token_ids: Sequence[int], num_drafts: int, now_s: float) -> None:
        tokens_came(self, token_ids, 0, now_s)

    def propose(self: Speculation, _: PassCosts, max_num: int) -> tuple[int, ...]:
        known = list(self._index._ids)
        (text,) = [text for text in texts if list(text[: len(known)]) == known]
        max_num = min(max_num, self._max_num_drafts, self._max_num_tokens - len(known) - 1)
        num = rng.randint(0, max(0, max_num))
        right = list(text[len(known) : len(known) + rng.randint(0, num)])
        wrong = [(text[min(len(text) - 1, len(known) + n)] + 1) % VOCAB_SIZE for n in range(len(right), num)]
        if num:
            nums.append(num)
        return (*right, *wrong)

    monkeypatch.setattr(Speculation, "tokens_came", came)
    monkeypatch.setattr(Speculation, "propose", propose)
    return nums
