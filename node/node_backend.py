"""The node behind its gateway: keys from the roster, prompts to the head, everything shown from one place.

Implements `gateway.backend.Backend`. It joins what others decide; it decides nothing about routes or prices.
"""

from __future__ import annotations

import asyncio
import hmac
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import partial

from ledger.entry import ISSUANCE, TREASURY
from ledger.session_record import SessionState
from node.books_view import account_rows, frozen_names, member_name, model_name, node_name, session_route_text
from node.catalogue import Catalogue, Entry
from node.changes import Changes
from node.gateway.backend import (
    Caller,
    DashboardView,
    GenerationRequest,
    KeyRefused,
    LedgerState,
    MemberRow,
    ModelCard,
    ModelRow,
    ModelState,
    NodeRow,
    NoRoute,
    RateLimit,
    RequestRow,
    RequestState,
    ShardRow,
    TextTokenizer,
    TreasuryState,
)
from node.generation import Generation
from node.key_gate import KeyGate
from node.ledger_thread import LedgerThread
from node.models.errors import ModelError
from node.models.tokenizer import ChatTokenizer
from node.pod_state import PodState
from node.sessions.authorization import Authorize, authorize, fits
from node.sessions.head import Head, SessionRequest
from node.sessions.terms import worst_case_microcredits
from node.sessions.timings import time_of
from node.time_view import stage_seconds, token_times
from pod.api_key import ApiKeyError, decode_delegation, parse_bearer, verify
from pod.identity import KeyPair
from pod.roster.roster import Roster

LOCAL_KEY_ID = bytes(16)
MAX_NUM_RECENT = 30
MAX_NUM_SPEEDS = 1000
MAX_NUM_KEYS = 1000

_REQUEST_STATES = {
    SessionState.OPEN: RequestState.OPEN,
    SessionState.SETTLED: RequestState.SETTLED,
}


class NodeBackend:
    def __init__(
        self,
        *,
        node: bytes,
        state: PodState,
        catalogue: Catalogue,
        head: Head,
        ledger: LedgerThread,
        changes: Changes,
        local_token: Callable[[], str],
        clock_ms: Callable[[], int],
    ) -> None:
        self._node = node
        self._state = state
        self._catalogue = catalogue
        self._head = head
        self._ledger = ledger
        self._changes = changes
        self._local_token = local_token
        self._clock_ms = clock_ms
        # Decode speed of sessions this node was the head of; the ledger does not know it.
        self._speeds: OrderedDict[bytes, float] = OrderedDict()
        # The keys of callers, by key id; they sign holds here and go nowhere else.
        self._keys: OrderedDict[bytes, KeyPair] = OrderedDict()
        self._gate = KeyGate(ledger.ledger, clock_ms)
        self._running: set[Generation] = set()

    async def authenticate(self, bearer: str) -> Caller:
        roster = self._state.roster
        local_token = self._local_token()
        if local_token and hmac.compare_digest(bearer.encode(), local_token.encode()):
            member = roster.member_of_node(self._node)
            if member is None:
                raise KeyRefused("this node is no longer in the pod")
            return Caller(member, member_name(roster, member), LOCAL_KEY_ID)
        try:
            key, delegation = parse_bearer(bearer)
            verify(delegation, roster, self._clock_ms())
        except ApiKeyError as error:
            raise KeyRefused(str(error)) from None
        if delegation.member != roster.member_of_node(self._node) and not fits(delegation):
            raise KeyRefused("the API key names too many models to be used at another member's node")
        self._keep_key(delegation.key_id, key)
        name = member_name(roster, delegation.member)
        return Caller(
            delegation.member,
            name,
            delegation.key_id,
            delegation.encode(),
            delegation.models,
            delegation.cap_microcredits,
            delegation.max_num_requests_per_minute,
            delegation.max_num_tokens_per_minute,
        )

    def _keep_key(self, key_id: bytes, key: KeyPair) -> None:
        self._keys[key_id] = key
        self._keys.move_to_end(key_id)
        while len(self._keys) > MAX_NUM_KEYS:
            self._keys.popitem(last=False)

    def _authorize(self, caller: Caller) -> Authorize | None:
        """How to prove that the caller lets this node charge it; None when it is this node's own member."""
        if caller.delegation is None or caller.member == self._state.roster.member_of_node(self._node):
            return None
        key = self._keys.get(caller.key_id)
        if key is None:
            raise KeyRefused("this node has forgotten the API key; send the request again")
        return partial(authorize, decode_delegation(caller.delegation), key.sign, self._node)

    def rate_limits(self, caller: Caller) -> Sequence[RateLimit]:
        return self._gate.rate_limits(caller)

    def roster_changed(self, _roster: Roster) -> None:
        """Answers that a revoked key still streams end now: whoever revokes it wants it to stop."""
        for generation in tuple(self._running):
            refusal = self._revoked(generation.caller)
            if refusal is not None:
                generation.refuse(refusal)

    def _revoked(self, caller: Caller) -> KeyRefused | None:
        roster = self._state.roster
        if caller.member not in roster.members:
            return KeyRefused("the API key's member was removed from this pod")
        if (caller.member, caller.key_id) in roster.revoked_keys:
            return KeyRefused("the API key was revoked")
        return None

    def may_view(self, member: bytes, key_id: bytes) -> bool:
        roster = self._state.roster
        if member not in roster.members or (member, key_id) in roster.revoked_keys:
            return False
        key = roster.keys.get((member, key_id))
        return key is None or not key.expires_ms or self._clock_ms() <= key.expires_ms

    def models(self) -> Sequence[ModelCard]:
        return [self._card(entry) for entry in self._catalogue.entries()]

    def _card(self, entry: Entry) -> ModelCard:
        """The context a client is offered is what the model has and the route's KV room can hold."""
        num_kv_tokens = self._state.num_kv_tokens(entry.deployed.id)
        max_context_tokens = entry.manifest.max_context_tokens
        return ModelCard(
            name=entry.deployed.name,
            created_s=0,
            owner=self._state.roster.name,
            vocab_size=entry.manifest.vocab_size,
            max_context_tokens=min(max_context_tokens, num_kv_tokens or max_context_tokens),
            ready=num_kv_tokens is not None,
        )

    async def tokenizer(self, model: str) -> TextTokenizer:
        entry = self._entry(model)
        if not entry.has_bundle:
            raise NoRoute(f"this node does not have the tokenizer of {model} yet; try again shortly")
        try:
            return _Tokenizer(await asyncio.to_thread(self._catalogue.tokenizer, entry.deployed.id))
        except ModelError as error:
            raise NoRoute(str(error)) from None

    def _entry(self, model: str) -> Entry:
        entry = self._catalogue.find(model)
        if entry is None:
            raise NoRoute(f"the pod no longer serves {model}")
        return entry

    async def generate(self, caller: Caller, request: GenerationRequest) -> Generation:
        entry = self._entry(request.model)
        authorize, rate_card = self._authorize(caller), self._state.rate_card()
        num_prompt_tokens = len(request.prompt_ids)
        max_num_new_tokens = request.sampling.max_num_output_tokens
        admission = self._gate.admit(
            caller,
            num_prompt_tokens + max_num_new_tokens,
            worst_case_microcredits(rate_card, entry.manifest, num_prompt_tokens, max_num_new_tokens),
        )
        try:
            session = await self._head.open(
                SessionRequest(
                    payer=caller.member,
                    key_id=caller.key_id,
                    model=entry.deployed.id,
                    manifest=entry.manifest,
                    prompt_ids=request.prompt_ids,
                    sampling=request.sampling,
                    authorize=authorize,
                ),
                rate_card,
            )
        except BaseException:
            admission.cancel()
            raise
        admission.held()
        route_text = self._state.route_text(session.terms.route)
        generation = Generation(caller, session, route_text, admission, self._ended)
        self._running.add(generation)
        self._changes.tell()
        if (refusal := self._revoked(caller)) is not None:
            # While it waited for its turn.
            await generation.settle(0)
            raise refusal
        return generation

    def _ended(self, generation: Generation) -> None:
        self._running.discard(generation)
        session = generation.head_session
        if session.tokens_per_s is not None:
            self._speeds[session.terms.session] = session.tokens_per_s
            while len(self._speeds) > MAX_NUM_SPEEDS:
                self._speeds.popitem(last=False)
        timed = time_of(session, self._clock_ms())
        if timed is not None:
            self._state.timings.add(timed)
        self._changes.tell()

    def dashboard(self) -> DashboardView:
        roster, ledger = self._state.roster, self._ledger.ledger
        rows = account_rows(ledger, roster)
        pots = {row.account: row.balance_microcredits for row in rows if row.account in (TREASURY, ISSUANCE)}
        return DashboardView(
            pod_name=roster.name,
            node_name=node_name(roster, self._node),
            member_name=member_name(roster, roster.member_of_node(self._node) or b""),
            members=tuple(
                MemberRow(
                    member=row.account,
                    name=row.name,
                    role=row.role,
                    balance_microcredits=row.balance_microcredits,
                    num_served_tokens=row.num_served_tokens,
                    num_consumed_tokens=row.num_consumed_tokens,
                    earned_microcredits=row.totals.microcredits_earned,
                    spent_microcredits=row.totals.microcredits_spent,
                )
                for row in rows
                if row.account not in pots
            ),
            treasury_microcredits=pots[TREASURY],
            issuance_microcredits=pots[ISSUANCE],
            treasury=self._treasury(),
            nodes=self._node_rows(),
            models=tuple(self._model_row(entry) for entry in self._catalogue.entries()),
            requests=self._request_rows(),
            ledger=LedgerState(
                ledger.num_entries(),
                len(ledger.heads()),
                ledger.digest(),
                frozen=tuple(frozen_names(ledger, roster)),
            ),
            stage_seconds=stage_seconds(self._state),
        )

    def _treasury(self) -> TreasuryState:
        card, totals = self._state.rate_card(), self._ledger.ledger.treasury()
        return TreasuryState(
            policy_name=card.name,
            levy_per_mille=card.levy_per_mille,
            dividend_per_mille=card.dividend_per_mille,
            dividend_period_s=card.dividend_period_s,
            credit_line_microcredits=card.credit_line_microcredits,
            levied_microcredits=totals.levied_microcredits,
            granted_microcredits=totals.granted_microcredits,
            dividends_paid_microcredits=totals.dividends_paid_microcredits,
            dividends_due_microcredits=totals.dividends_due_microcredits,
        )

    def _node_rows(self) -> tuple[NodeRow, ...]:
        roster, statuses, live = self._state.roster, self._state.statuses(), self._state.live()
        rows = []
        for node in sorted(roster.nodes.values(), key=lambda n: n.name):
            status = statuses.get(node.id)
            shards = status.shards if status else ()
            rows.append(
                NodeRow(
                    node=node.id,
                    name=node.name,
                    member_name=member_name(roster, node.member),
                    device=status.device if status else "",
                    memory_bytes=status.memory_bytes if status else 0,
                    live=node.id in live,
                    is_this_node=node.id == self._node,
                    address=status.data_address if status else "",
                    shards=tuple(
                        ShardRow(model_name(roster, s.model), s.start_layer, s.end_layer, s.loaded_per_mille)
                        for s in shards
                    ),
                    note=self._state.note_of(node.id),
                )
            )
        return tuple(rows)

    def _model_row(self, entry: Entry) -> ModelRow:
        condition = self._state.condition_of(entry)
        return ModelRow(
            name=entry.deployed.name,
            num_layers=entry.manifest.num_layers,
            num_parameters=entry.manifest.stage_num_parameters(0, entry.manifest.num_layers),
            dtype=entry.manifest.weight_type,
            max_context_tokens=entry.manifest.max_context_tokens,
            state=ModelState(condition.state),
            loaded_per_mille=condition.loaded_per_mille,
            reason=condition.reason,
            tokens_per_s=self._state.tokens_per_s(entry.deployed.id),
            predicted_tokens_per_s=self._state.predicted_tokens_per_s(entry.deployed.id, condition.route),
            token_times=token_times(self._state, entry.deployed.id),
        )

    def _request_rows(self) -> tuple[RequestRow, ...]:
        roster = self._state.roster
        return tuple(
            RequestRow(
                session=summary.session,
                time_ms=summary.opened_ms or 0,
                member_name=member_name(roster, summary.payer),
                model_name=model_name(roster, summary.model),
                route_text=session_route_text(roster, summary),
                num_prompt_tokens=summary.num_prompt_tokens,
                num_output_tokens=summary.num_output_tokens,
                tokens_per_s=self._speeds.get(summary.session),
                price_microcredits=summary.amount_microcredits,
                state=_REQUEST_STATES.get(summary.state, RequestState.VOIDED),
            )
            for summary in self._ledger.ledger.recent_sessions(MAX_NUM_RECENT)
        )

    def changes(self) -> AsyncGenerator[None, None]:
        return self._changes.listen()


class _Tokenizer:
    """A package's tokenizer with the errors the gateway expects."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._tokenizer.eos_token_ids

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        try:
            return self._tokenizer.apply_chat_template(messages)
        except ModelError as error:
            raise ValueError(str(error)) from None

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self._tokenizer.decode(ids, skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)
