"""How long steps take here: decode steps by how many sessions are in them, prefill by the token.

Learned from the steps themselves; it says how much prefill fits beside decodes without stalling them. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

_WEIGHT = 0.2
# Prefill that turns out slower than thought stalls others: believed sooner than good news.
_BAD_NEWS_WEIGHT = 0.5
# One step that took long for another reason (a busy machine) moves an estimate only so far.
_MAX_RISE = 3.0
_MIN_NUM_TOKENS = 4
_SOME_ROWS = 4


class Pace:
    def __init__(
        self, decode_s: float, prefill_s_per_token: float, decode_s_of: Mapping[int, float] | None = None
    ) -> None:
        """What was measured when the shard was loaded, until there is better; `decode_s_of` by sessions."""
        self._decode_s: dict[int, float] = {0: max(decode_s, 1e-6)}
        for num_sessions, step_s in (decode_s_of or {}).items():
            self._decode_s[num_sessions.bit_length()] = max(step_s, 1e-6)
        self.prefill_s_per_token = max(prefill_s_per_token, 1e-9)
        # What a guess adds to a decode step; as long as none was made, what another session would.
        self.row_s = max(self.prefill_s_per_token, (self.decode_s(_SOME_ROWS) - decode_s) / (_SOME_ROWS - 1))

    def decode_s(self, num_sessions: int) -> float:
        """Of a step with so many decodes and nothing else; from a similar one if there was none such yet."""
        known = self._decode_s
        size = num_sessions.bit_length()
        while size not in known:
            size -= 1
        return known[size]

    def learn(self, num_decodes: int, num_prefill_tokens: int, step_s: float, num_drafts: int = 0) -> None:
        if num_drafts:
            if num_prefill_tokens == 0:
                self._learn_row(num_drafts, (step_s - self.decode_s(num_decodes)) / num_drafts)
        elif num_prefill_tokens == 0:
            size = num_decodes.bit_length()
            old = self._decode_s.get(size)
            self._decode_s[size] = step_s if old is None else _mixed(old, step_s)
        elif num_prefill_tokens >= _MIN_NUM_TOKENS:
            own_s = step_s - self.decode_s(num_decodes) if num_decodes else step_s
            per_token_s = max(own_s, 0.05 * step_s) / num_prefill_tokens
            weight = _BAD_NEWS_WEIGHT if per_token_s > self.prefill_s_per_token else _WEIGHT
            self.prefill_s_per_token = _mixed(self.prefill_s_per_token, per_token_s, weight)

    def _learn_row(self, num_drafts: int, row_s: float) -> None:
        """No less than half of what a row costs among very many, no more than what it costs alone.

        The fewer rows there were, the more the difference of two steps says of other things.
        """
        row_s = min(max(row_s, 0.5 * self.prefill_s_per_token), self.decode_s(1))
        self.row_s = _mixed(self.row_s, row_s, _WEIGHT * min(1.0, num_drafts / _SOME_ROWS))


def _mixed(old: float, new: float, weight: float = _WEIGHT) -> float:
    return old + weight * (min(new, _MAX_RISE * old) - old)
