"""What each head has had of this stage without paying for it, and when that is too much.

A session can lose little (`meter.py`); a head that opens one after the other could take much. So per head
there is an account in tokens: work that was not signed for when its session ended, and prompts of replays,
which nobody pays for. Time lets it go down to nothing, and what the head signs for below that: who has paid
for so many tokens may lose a neighbour with all its sessions, and replay them. A replay of what this stage
itself preempted or failed at is owed, and costs the head nothing here; one for a lost link is not, for a head
can lose its own. Work before the first output token is not counted:
a client may go away, and its head has had nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from node.engine.opening import Refusal
from node.links.frames import ErrorCode, OpenSession

# Honest heads stay far below: some tokens on their way when a client goes, replays when a stage is lost.
MAX_NUM_UNPAID_TOKENS = 1 << 18
MAX_NUM_TOKENS_IN_CREDIT = 1 << 20
FORGIVE_ONE_TOKEN_MS = 1_000
MAX_NUM_OWED_TOKENS = 1 << 20
# The head may have had that many more when the stage broke off.
NUM_SPARE_TOKENS = 64


@dataclass(slots=True)
class _Account:
    """Tokens; `num_owed` of replays that this stage has made necessary."""

    since_ms: int
    num_unpaid: int = 0
    num_owed: int = 0


class Unpaid:
    """Heads are nodes of the roster, so there are never many accounts. Owned by the loop thread."""

    def __init__(self, clock_ms: Callable[[], int]) -> None:
        self._clock_ms = clock_ms
        self._accounts: dict[bytes, _Account] = {}

    def num_unpaid(self, head: bytes) -> int:
        return self._account(head).num_unpaid

    def check(self, head: bytes, opening: OpenSession) -> None:
        """Raises Refusal when the head has had too much, or would have with this replay."""
        account = self._account(head)
        num_tokens = account.num_unpaid + self._num_free(account, opening)
        if num_tokens > MAX_NUM_UNPAID_TOKENS:
            message = f"this head would have had {num_tokens} tokens here that nobody pays for"
            raise Refusal(ErrorCode.UNSIGNED_LIMIT, message)

    def admitted(self, opening: OpenSession) -> None:
        if opening.num_output_tokens_before:
            account = self._account(opening.head)
            account.num_unpaid += self._num_free(account, opening)
            account.num_owed = max(0, account.num_owed - opening.num_prompt_tokens)

    def _num_free(self, account: _Account, opening: OpenSession) -> int:
        if not opening.num_output_tokens_before:
            return 0
        return max(0, opening.num_prompt_tokens - account.num_owed)

    def interrupted(self, head: bytes, num_tokens: int) -> None:
        """This stage broke off a session of so many tokens."""
        account = self._account(head)
        account.num_owed = min(MAX_NUM_OWED_TOKENS, account.num_owed + num_tokens + NUM_SPARE_TOKENS)

    def lost(self, head: bytes, num_tokens: int) -> None:
        """A session ended with so many tokens unsigned."""
        if num_tokens > 0:
            self._account(head).num_unpaid += num_tokens

    def signed(self, head: bytes, num_tokens: int) -> None:
        account = self._account(head)
        account.num_unpaid = max(-MAX_NUM_TOKENS_IN_CREDIT, account.num_unpaid - num_tokens)

    def _account(self, head: bytes) -> _Account:
        now_ms = self._clock_ms()
        account = self._accounts.setdefault(head, _Account(now_ms))
        num_forgiven = max(0, now_ms - account.since_ms) // FORGIVE_ONE_TOKEN_MS
        if account.num_unpaid > 0:
            account.num_unpaid = max(0, account.num_unpaid - num_forgiven)
        account.since_ms += num_forgiven * FORGIVE_ONE_TOKEN_MS
        return account
