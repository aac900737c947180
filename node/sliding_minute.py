"""One limit over a sliding minute: what is left of it, and when more will be. Pure; the time is handed in."""

from __future__ import annotations

from dataclasses import dataclass

MINUTE_MS = 60_000
# What running requests will use in the end is known when they end: who waits for that asks again soon.
ASK_AGAIN_MS = 5_000


@dataclass(frozen=True, slots=True)
class SlidingMinute:
    """`used` is (time_ms, amount), oldest first, nothing older than a minute; `running` has not ended yet."""

    limit: int
    used: tuple[tuple[int, int], ...]
    running: int = 0

    @property
    def remaining(self) -> int:
        return max(0, self.limit - self.running - sum(amount for _, amount in self.used))

    def wait_ms(self, amount: int, now_ms: int) -> int | None:
        """How long until `amount` fits: 0 when it does now, None when it never will."""
        if amount > self.limit:
            return None
        free = self.limit - self.running - sum(used for _, used in self.used)
        if amount <= free:
            return 0
        for time_ms, used in self.used:
            free += used
            if amount <= free:
                return max(1, time_ms + MINUTE_MS - now_ms)
        return ASK_AGAIN_MS

    def reset_ms(self, now_ms: int) -> int:
        """How long until all of it is free again, if nothing more is asked for."""
        if self.running:
            return MINUTE_MS
        return max(0, self.used[-1][0] + MINUTE_MS - now_ms) if self.used else 0
