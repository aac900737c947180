"""When guessing pays: how often guesses came true of late, against what a row more in a step costs.

A guess further on comes true only if all before it do, so with a rate r the n-th is worth r^n of a pass, and
pays while that is more than its price. Guesses that were wrong make a pause, longer each time. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

# Below this much better than break-even it is not worth the risk: the costs are estimates.
MARGIN = 1.15
MAX_PAUSE_TOKENS = 128
# Between tries of what did not pay so far.
_PROBE_PAUSE_TOKENS = 16
_WEIGHT = 0.12
_MISS_WEIGHT = 0.4


def num_that_pay(rate: float, price: float, max_num: int) -> int:
    """`price`: of one row more, in passes."""
    num, worth = 0, rate
    while num < max_num and worth > price * MARGIN:
        num, worth = num + 1, worth * rate
    return num


@dataclass(slots=True)
class DraftOdds:
    """Of one kind of guess. All counts are tokens of the text."""

    rate: float
    pause_tokens: int
    resume_at: int = 0

    def num_to_try(self, at: int, price: float, max_num: int) -> int:
        """At token `at`: what pays, or now and then one to see whether that has changed."""
        if at < self.resume_at:
            return 0
        num = num_that_pay(self.rate, price, max_num)
        if num == 0 and num_that_pay(1.0, price, min(1, max_num)):
            self.resume_at = at + _PROBE_PAUSE_TOKENS
            return 1
        return num

    def learn(self, at: int, num_proposed: int, num_accepted: int) -> None:
        for _ in range(num_accepted):
            self.rate += _WEIGHT * (1 - self.rate)
        if num_accepted < num_proposed:
            self.rate *= 1 - (_WEIGHT if num_accepted else _MISS_WEIGHT)
        if num_accepted:
            self.pause_tokens = max(1, self.pause_tokens // 4)
        else:
            self.resume_at = max(self.resume_at, at + self.pause_tokens)
            self.pause_tokens = min(2 * self.pause_tokens, MAX_PAUSE_TOKENS)
