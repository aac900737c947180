"""Fair use at one engine: who pays for a session, what its tokens count for, and whose turn is next.

The node process says which node is whose and what every member weighs; a payer that is not the head's own
member must have signed for it. Until it was said, nobody is checked and all weigh the same (an engine alone).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ledger.entry import HoldOpened
from ledger.rate_card import PER_MILLE
from node.engine.messages import MemberStanding
from node.engine.opening import Refusal
from node.engine.session import Slice, StageSession
from node.engine.turns import Asker, Claim, Turns
from node.links.frames import ErrorCode, OpenSession
from node.sessions.authorization import is_authorized
from node.sessions.terms import HOLD_GRACE_S
from node.token_counter import TokenCounter

# How much a member that goes on asking may have left unused and still catch up on.
MAX_LAG_TOKENS = 32_768
PREEMPTED_MS = 60_000
MAX_NUM_PREEMPTED = 1024
_COST_PER_PARAMETERS = 1_000

_Entitlement = tuple[bytes, bytes, bytes, int]


class FairShare:
    def __init__(self, node: bytes, pod: bytes, clock_ms: Callable[[], int]) -> None:
        self._node = node
        self._pod = pod
        self._clock_ms = clock_ms
        self._weights: dict[bytes, int] = {}
        self._past_line: set[bytes] = set()
        self._member_of: dict[bytes, bytes] = {}
        self._preempted: dict[_Entitlement, int] = {}
        self.counter = TokenCounter(self._weight_of)
        self.turns = Turns(self.counter.count)

    def set_standings(self, standings: Sequence[MemberStanding]) -> None:
        self._weights = {standing.member: standing.weight_per_mille for standing in standings}
        self._past_line = {standing.member for standing in standings if standing.is_past_credit_line}
        self._member_of = {node: standing.member for standing in standings for node in standing.nodes}

    def _weight_of(self, member: bytes) -> int:
        if not self._member_of:
            return PER_MILLE
        return self._weights.get(member, 1)

    def check_payer(self, opening: OpenSession) -> None:
        """Raises Refusal unless the head's own member pays, or the payer's key signed for the session."""
        if not self._member_of or self._member_of.get(opening.head) == opening.payer:
            return
        hold = HoldOpened(
            session=opening.session,
            payer=opening.payer,
            key_id=opening.key_id,
            model=opening.model,
            amount_microcredits=opening.hold_microcredits,
            expires_at_ms=opening.deadline_ms + HOLD_GRACE_S * 1000,
            rate_card_version=opening.rate_card_version,
            authorization=opening.authorization,
        )
        if opening.payer not in self._weights or not is_authorized(self._pod, opening.head, hold):
            raise Refusal(ErrorCode.BAD_FRAME, "the payer has not let this head charge it")

    def asker(self, opening: OpenSession, cache: int) -> Asker:
        is_replay = opening.num_output_tokens_before > 0
        return Asker(opening.payer, self._claim(opening), is_replay, cache)

    def _claim(self, opening: OpenSession) -> Claim:
        if self._preempted.get(_entitlement(opening), 0) > self._clock_ms():
            return Claim.PREEMPTED
        if opening.payer == self._member_of.get(self._node):
            return Claim.OWN_MACHINE
        return Claim.PAST_CREDIT_LINE if opening.payer in self._past_line else Claim.SHARE

    def ask(self, asker: Asker, cost_per_token: int, served: Iterable[bytes], now_ms: int) -> None:
        """For the first time; `served` are the payers of open sessions."""
        waiting, served = self.turns.members(now_ms), set(served)
        if asker.member in waiting or asker.member in served:
            self.counter.lift(asker.member, waiting or served, MAX_LAG_TOKENS * cost_per_token)
        else:
            self.counter.lift(asker.member, waiting | served)

    # What sessions do.

    def charge(self, parts: Iterable[Slice]) -> None:
        """Every row that was computed, guesses included: they take the place of others."""
        for part in parts:
            session = part.session
            is_prompt = part.position < session.num_prompt_tokens
            cost = session.cost_per_prompt_token if is_prompt else session.cost_per_output_token
            self.counter.charge(session.payer, cost * part.num_tokens)

    def rank(self, session: StageSession) -> tuple[int, int]:
        """The lowest goes first when a step cannot hold all."""
        return session.payer != self._member_of.get(self._node), self.counter.count(session.payer)

    def preempted(self, session: StageSession) -> None:
        """Its replay, which is no longer than what is left of it, comes before others."""
        now_ms = self._clock_ms()
        if len(self._preempted) >= MAX_NUM_PREEMPTED:
            self._preempted = {key: until for key, until in self._preempted.items() if until > now_ms}
        if len(self._preempted) < MAX_NUM_PREEMPTED:
            self._preempted[_entitlement(session.opening)] = now_ms + PREEMPTED_MS

    def admitted(self, opening: OpenSession, asker: Asker) -> None:
        self.turns.given(asker)
        if asker.claim is Claim.PREEMPTED:
            self._preempted.pop(_entitlement(opening), None)


def cost_per_token(num_parameters: int, weight_per_mille: int) -> int:
    """Of one stage, in thousands of parameter-tokens: what a token of a bigger model takes, it counts for."""
    cost = max(1, num_parameters // _COST_PER_PARAMETERS) * weight_per_mille // PER_MILLE
    # What a rate card gives away still takes the place of others.
    return max(1, cost)


def _entitlement(opening: OpenSession) -> _Entitlement:
    """The prompt of a replay is longer by as much as its output is shorter."""
    num_left = opening.sampling.max_num_output_tokens - opening.num_output_tokens_before
    return opening.head, opening.payer, opening.model, opening.num_prompt_tokens + num_left
