"""What the first stage guesses of a session's next tokens, so that one pass through the ring yields several.

A guess is what followed the same few tokens earlier in prompt or output. The last stage picks the token of
every row as it would without; a guess only decides whether that row was computed already. How many are worth
a row is `draft_odds.py`'s business. Knows one session's ids; no frames, no rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from node.engine.draft_odds import DraftOdds
from node.engine.ngram_index import NgramIndex

_ROUND_WEIGHT = 0.2
_MAX_RISE = 3.0


@dataclass(frozen=True, slots=True)
class PassCosts:
    """In seconds: a pass through all stages, and what a row more adds to the passes of all who share them."""

    pass_s: float
    row_s: float


class Speculation:
    def __init__(self, prompt_ids: Sequence[int], max_num_tokens: int, max_num_drafts: int) -> None:
        """`max_num_tokens` of prompt and output together."""
        self._index = NgramIndex(prompt_ids, max_num_tokens)
        self._max_num_tokens = max_num_tokens
        self._max_num_drafts = max_num_drafts
        # The longer the run that was found before, the likelier is what followed it.
        self._odds = {4: DraftOdds(0.7, 1), 3: DraftOdds(0.5, 2), 2: DraftOdds(0.3, 4)}
        self._run = 0
        self._started_s: float | None = None
        self._round_s: float | None = None

    @property
    def round_s(self) -> float | None:
        """How long it takes from a pass's begin here to its token; None before the first."""
        return self._round_s

    def pass_began(self, now_s: float) -> None:
        self._started_s = now_s

    def tokens_came(self, token_ids: Sequence[int], num_drafts: int, now_s: float) -> None:
        """After an input with `num_drafts` guesses: all tokens but the last are such that came true."""
        if self._started_s is not None:
            round_s, self._started_s = now_s - self._started_s, None
            old_s = self._round_s
            self._round_s = (
                round_s if old_s is None else old_s + _ROUND_WEIGHT * (min(round_s, 3 * old_s) - old_s)
            )
        for token_id in token_ids:
            self._index.add(token_id)
        if num_drafts:
            self._odds[self._run].learn(len(self._index), num_drafts, len(token_ids) - 1)

    def _learn_round(self, now_s: float) -> None:
        if self._started_s is None:
            return
        round_s, self._started_s = now_s - self._started_s, None
        old_s = self._round_s or round_s
        self._round_s = old_s + _ROUND_WEIGHT * (min(round_s, _MAX_RISE * old_s) - old_s)

    def propose(self, costs: PassCosts, max_num: int) -> tuple[int, ...]:
        """Guesses of what follows the last token: at most `max_num`, and what the session has left to say."""
        at = len(self._index)
        # The last token of all is never run, and the one before it needs no guess after it.
        max_num = min(max_num, self._max_num_drafts, self._max_num_tokens - at - 1)
        if max_num <= 0:
            return ()
        self._run, guesses = self._index.following(max_num)
        if not guesses:
            return ()
        num = self._odds[self._run].num_to_try(at, costs.row_s / costs.pass_s, max_num)
        return guesses[:num]
