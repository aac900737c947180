"""What an API key may still do at this gateway: its cap over all gateways, its limits over a sliding minute.

What was admitted here counts at once, what others admitted as soon as the ledger shows it. So gateways that
cannot see each other let a key spend its cap once each: at most its cap times their number, never more.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from ledger.key_use import Key, KeyUse
from ledger.ledger import Ledger
from ledger.rate_card import MICROCREDITS_PER_CREDIT
from node.gateway.backend import Caller, QuotaExceeded, RateLimit, RateLimited
from node.sliding_minute import MINUTE_MS, SlidingMinute

MAX_NUM_IDLE_KEYS = 1000


@dataclass(slots=True)
class _Here:
    """One key at this gateway. `requests` are times, `ended` times and tokens, within the last minute."""

    requests: deque[int] = field(default_factory=deque)
    ended: deque[tuple[int, int]] = field(default_factory=deque)
    num_running: int = 0
    num_running_tokens: int = 0
    # Admitted, and not yet among the holds that the ledger shows.
    pending_microcredits: int = 0

    def forget(self, now_ms: int) -> None:
        while self.requests and self.requests[0] <= now_ms - MINUTE_MS:
            self.requests.popleft()
        while self.ended and self.ended[0][0] <= now_ms - MINUTE_MS:
            self.ended.popleft()

    @property
    def is_idle(self) -> bool:
        return not (self.requests or self.ended or self.num_running)


class Admission:
    """One request of a key that was let in. Told when its hold is open and, once, how it ended."""

    def __init__(self, here: _Here, num_tokens: int, amount_microcredits: int, clock_ms: Callable[[], int]):
        self._here = here
        self._num_tokens = num_tokens
        self._pending_microcredits = amount_microcredits
        self._clock_ms = clock_ms
        self._is_running = True
        self._began_ms = clock_ms()
        here.requests.append(self._began_ms)
        here.num_running += 1
        here.num_running_tokens += num_tokens
        here.pending_microcredits += amount_microcredits

    def held(self) -> None:
        """The ledger shows the hold now."""
        self._here.pending_microcredits -= self._pending_microcredits
        self._pending_microcredits = 0

    def end(self, num_tokens: int | None = None) -> None:
        """It used so many tokens; as many as it might have when that is not known. Later calls do nothing."""
        if not self._is_running:
            return
        self._is_running = False
        self.held()
        self._here.num_running -= 1
        self._here.num_running_tokens -= self._num_tokens
        used = self._num_tokens if num_tokens is None else num_tokens
        if used:
            self._here.ended.append((self._clock_ms(), used))

    def cancel(self) -> None:
        """It never began: nothing of it counts."""
        if self._is_running and self._began_ms in self._here.requests:
            self._here.requests.remove(self._began_ms)
        self.end(0)


class KeyGate:
    """Belongs to the event loop. Reads the ledger, and keeps what the ledger does not show yet."""

    def __init__(self, ledger: Ledger, clock_ms: Callable[[], int]) -> None:
        self._ledger = ledger
        self._clock_ms = clock_ms
        # What this node did in an earlier life, the ledger shows.
        self._began_ms = clock_ms()
        self._keys: OrderedDict[Key, _Here] = OrderedDict()

    def admit(self, caller: Caller, num_tokens: int, worst_case_microcredits: int) -> Admission:
        """Let in a request of at most so many tokens and credits. Raises QuotaExceeded or RateLimited."""
        now_ms, here = self._clock_ms(), self._here(caller) if caller.has_limits else _Here()
        if caller.has_limits:
            use = self._use(caller, now_ms)
            if caller.max_num_requests_per_minute:
                _check_rate("requests", _requests(caller, here, use), 1, now_ms)
            if caller.max_num_tokens_per_minute:
                _check_rate("tokens", _tokens(caller, here, use), num_tokens, now_ms)
            if caller.cap_microcredits:
                _check_cap(caller, here, use, worst_case_microcredits)
        return Admission(here, num_tokens, worst_case_microcredits, self._clock_ms)

    def rate_limits(self, caller: Caller) -> tuple[RateLimit, ...]:
        """The key's limits per minute as they stand now."""
        if not (caller.max_num_requests_per_minute or caller.max_num_tokens_per_minute):
            return ()
        now_ms, here = self._clock_ms(), self._here(caller)
        use = self._use(caller, now_ms)
        limits = []
        if caller.max_num_requests_per_minute:
            limits.append(_rate_limit("requests", _requests(caller, here, use), now_ms))
        if caller.max_num_tokens_per_minute:
            limits.append(_rate_limit("tokens", _tokens(caller, here, use), now_ms))
        return tuple(limits)

    def _use(self, caller: Caller, now_ms: int) -> KeyUse:
        use = self._ledger.key_use(caller.member, caller.key_id, now_ms - MINUTE_MS + 1, self._began_ms)
        # Clocks differ; what is dated further ahead would count for longer than a minute.
        latest_ms = now_ms + MINUTE_MS
        opened_ms = tuple(time_ms for time_ms in use.opened_ms if time_ms <= latest_ms)
        settled = tuple(one for one in use.settled if one[0] <= latest_ms)
        return replace(use, opened_ms=opened_ms, settled=settled)

    def _here(self, caller: Caller) -> _Here:
        key, now_ms = (caller.member, caller.key_id), self._clock_ms()
        here = self._keys.pop(key, None) or _Here()
        if len(self._keys) >= MAX_NUM_IDLE_KEYS:
            self._forget_idle(now_ms)
        here.forget(now_ms)
        self._keys[key] = here
        return here

    def _forget_idle(self, now_ms: int) -> None:
        for key, here in list(self._keys.items()):
            here.forget(now_ms)
            if here.is_idle:
                del self._keys[key]


def _requests(caller: Caller, here: _Here, use: KeyUse) -> SlidingMinute:
    used = ((time_ms, 1) for time_ms in (*here.requests, *use.opened_ms))
    return SlidingMinute(caller.max_num_requests_per_minute, _in_order(used))


def _tokens(caller: Caller, here: _Here, use: KeyUse) -> SlidingMinute:
    used = _in_order((*here.ended, *use.settled))
    return SlidingMinute(caller.max_num_tokens_per_minute, used, here.num_running_tokens)


def _in_order(used: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(used))


def _check_rate(unit: Literal["requests", "tokens"], minute: SlidingMinute, amount: int, now_ms: int) -> None:
    wait_ms = minute.wait_ms(amount, now_ms)
    if wait_ms == 0:
        return
    about = f"This API key may use {minute.limit} {unit} per minute"
    if wait_ms is None:
        raise RateLimited(
            f"{about}; this one request may use {amount}. Ask for fewer tokens (max_tokens).", unit, None
        )
    # A clock elsewhere may run ahead of ours; nobody waits for longer than the minute.
    wait_s = min(-(-wait_ms // 1000), MINUTE_MS // 1000)
    left = f"{minute.remaining} are left" + (f" and this request may use {amount}" if amount > 1 else "")
    raise RateLimited(f"{about}; {left}. Try again in {wait_s} s.", unit, wait_s)


def _rate_limit(unit: Literal["requests", "tokens"], minute: SlidingMinute, now_ms: int) -> RateLimit:
    reset_ms = min(minute.reset_ms(now_ms), MINUTE_MS)
    return RateLimit(unit, minute.limit, minute.remaining, reset_ms)


def _check_cap(caller: Caller, here: _Here, use: KeyUse, worst_case_microcredits: int) -> None:
    held = use.held_microcredits + here.pending_microcredits
    if use.spent_microcredits + held + worst_case_microcredits <= caller.cap_microcredits:
        return
    raise QuotaExceeded(
        f"This API key may spend {_credits(caller.cap_microcredits)} credits: "
        f"{_credits(use.spent_microcredits)} are spent, {_credits(held)} are held for running requests, and "
        f"this request may cost up to {_credits(worst_case_microcredits)}. "
        "Ask for fewer tokens (max_tokens) or use another key."
    )


def _credits(microcredits: int) -> str:
    whole, rest = divmod(microcredits, MICROCREDITS_PER_CREDIT)
    return f"{whole}.{rest:06d}"
