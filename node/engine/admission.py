"""Admission: a session comes in when there is a place for it, and its prompt and a little more fit; the rest
is found later.

When there is not enough for all who ask, whose turn it is is `turns.py`'s to say: what is kept for others is
not given away.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ledger.rate_card import RateCard
from node.engine.fair_share import FairShare, cost_per_token
from node.engine.kv_cache import BLOCK_TOKENS, BlockTable, num_blocks_for
from node.engine.loaded import LoadedShard
from node.engine.meter import Meter
from node.engine.opening import NoRoom, Refusal, find_shard, packed_ids
from node.engine.prefix_cache import scope_of
from node.engine.sampling_edits import LogitEdits
from node.engine.session import StageSession, max_num_tokens, num_own_prompt_tokens
from node.engine.session_book import SessionBook
from node.engine.turns import Asker, Rank
from node.links.frames import ErrorCode, OpenSession

MAX_NUM_SESSIONS = 4096
MAX_NUM_SESSIONS_PER_HEAD = 1024
MAX_SESSION_MS = 3600_000
NUM_SPARE_TOKENS = BLOCK_TOKENS


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A session that may come in when there is room: everything else is checked. Owns its prompt ids.

    `num_wanted_tokens` is what it needs to begin.
    """

    opening: OpenSession
    prompt_ids: array[int]
    loaded: LoadedShard
    rate_card: RateCard
    scope: bytes
    asker: Asker
    num_wanted_tokens: int
    num_parameters: int


class Admission:
    def __init__(
        self,
        node: bytes,
        pod: bytes,
        book: SessionBook,
        shards: Sequence[LoadedShard],
        rate_cards: dict[int, RateCard],
        clock_ms: Callable[[], int],
        fair_share: FairShare | None = None,
        max_num_sessions: int = MAX_NUM_SESSIONS,
    ) -> None:
        """`shards` and `rate_cards` are the engine's own, as they change."""
        self._node = node
        self._pod = pod
        self._book = book
        self._shards = shards
        self._rate_cards = rate_cards
        self._clock_ms = clock_ms
        self._fair_share = fair_share or FairShare(node, pod, clock_ms)
        self._max_num_sessions = min(max_num_sessions, MAX_NUM_SESSIONS)

    def admit(self, peer: bytes, opening: OpenSession) -> StageSession:
        """Check everything, then take room. Raises Refusal; the caller puts the session in the book."""
        return self.take(self.check(peer, opening))

    def check(self, peer: bytes, opening: OpenSession) -> Candidate:
        """All but room. Raises Refusal."""
        if (num_open := self._book.num_of_head[peer]) >= MAX_NUM_SESSIONS_PER_HEAD:
            raise Refusal(ErrorCode.NO_KV_ROOM, f"{num_open} sessions of this head are open here already")
        if (num_open := len(self._book.sessions)) >= MAX_NUM_SESSIONS:
            raise Refusal(ErrorCode.NO_KV_ROOM, f"{num_open} sessions are open here already")
        loaded = find_shard(opening, self._node, peer, self._shards)
        self._fair_share.check_payer(opening)
        rate_card = self._rate_cards.get(opening.rate_card_version)
        if rate_card is None:
            # The newest may be on its way here: the head tries others, then this stage again.
            raise Refusal(ErrorCode.UNKNOWN_SHARD, f"rate card {opening.rate_card_version} is not known here")
        now_ms = self._clock_ms()
        if opening.deadline_ms <= now_ms:
            raise Refusal(ErrorCode.DEADLINE, "the session's deadline has passed")
        most, num_cache_tokens = max_num_tokens(opening), loaded.cache.num_tokens
        if most > num_cache_tokens:
            raise Refusal(
                ErrorCode.KV_BUDGET_TOO_SMALL,
                f"{most} tokens of KV room may be needed, this stage has {num_cache_tokens} in all",
            )
        stage = opening.route[opening.stage_index]
        num_parameters = loaded.manifest.stage_num_parameters(stage.start_layer, stage.end_layer)
        asker = self._fair_share.asker(opening, id(loaded.cache))
        output_cost = cost_per_token(num_parameters, rate_card.output_weight_per_mille)
        self._fair_share.ask(asker, output_cost, self._book.num_of_payer, now_ms)
        return Candidate(
            opening=replace(opening, prompt_ids=()),
            prompt_ids=packed_ids(opening.prompt_ids),
            loaded=loaded,
            rate_card=rate_card,
            scope=scope_of(opening),
            asker=asker,
            num_wanted_tokens=min(most, opening.num_prompt_tokens + NUM_SPARE_TOKENS),
            num_parameters=num_parameters,
        )

    def take(self, candidate: Candidate) -> StageSession:
        """Raises NoRoom; what it wants is then kept for it a while, if its turn comes."""
        now_ms = self._clock_ms()
        if candidate.loaded not in self._shards:
            raise Refusal(ErrorCode.SHUTTING_DOWN, "the shard was dropped")
        try:
            table, num_cached_tokens = self._take_room(candidate, now_ms)
        except NoRoom:
            num_blocks = num_blocks_for(candidate.num_wanted_tokens)
            self._fair_share.turns.asks(candidate.asker, num_blocks, now_ms)
            raise
        opening, loaded, card = candidate.opening, candidate.loaded, candidate.rate_card
        self._fair_share.admitted(opening, candidate.asker)
        stage = opening.route[opening.stage_index]
        num_parameters = candidate.num_parameters
        return StageSession(
            opening=opening,
            loaded=loaded,
            group=self._book.group(loaded, stage.start_layer, stage.end_layer, len(opening.route)),
            table=table,
            meter=Meter(opening, self._pod, num_parameters, card),
            end_ms=min(opening.deadline_ms, now_ms + MAX_SESSION_MS),
            prompt_ids=candidate.prompt_ids,
            scope=candidate.scope,
            num_cached_tokens=num_cached_tokens,
            number=self._book.next_number(),
            edits=_edits(opening, candidate.prompt_ids),
            claim=candidate.asker.claim,
            cost_per_prompt_token=cost_per_token(num_parameters, card.prompt_weight_per_mille),
            cost_per_output_token=cost_per_token(num_parameters, card.output_weight_per_mille),
        )

    def rank(self, candidate: Candidate) -> Rank:
        """The lowest is next."""
        return self._fair_share.turns.rank(candidate.asker)

    def _take_room(self, candidate: Candidate, now_ms: int) -> tuple[BlockTable, int]:
        """The table, and how many tokens of it are in the cache already: never the whole prompt."""
        opening, cache, wanted = candidate.opening, candidate.loaded.cache, candidate.num_wanted_tokens
        num_free_slots, turns = self._max_num_sessions - self._book.num_with_kv, self._fair_share.turns
        if num_free_slots <= 0:
            turns.no_room()
            raise NoRoom(ErrorCode.NO_KV_ROOM, f"0 of {self._max_num_sessions} places are free")
        num_kept_slots, num_kept_blocks = turns.kept_before(
            candidate.asker, num_free_slots, self._num_free_blocks, now_ms
        )
        if num_free_slots <= num_kept_slots:
            places = f"{num_free_slots} of {self._max_num_sessions} places are free"
            raise NoRoom(ErrorCode.NO_KV_ROOM, f"{places}, {num_kept_slots} for who waits longer")
        num_reusable = min(opening.num_prompt_tokens - 1, num_own_prompt_tokens(opening)) // BLOCK_TOKENS
        cached = cache.prefixes.take(candidate.scope, opening.prefix_hashes[:num_reusable])
        num_new_blocks = num_blocks_for(wanted) - len(cached)
        if cache.pool.can_allocate(num_new_blocks + num_kept_blocks):
            table = cache.open_after(cached, wanted)
            assert table is not None
            return table, len(cached) * BLOCK_TOKENS
        cache.pool.free(reversed(cached))
        room = f"{cache.num_free_tokens} of {cache.num_tokens} are free"
        kept = f", {num_kept_blocks * BLOCK_TOKENS} for who waits longer" if num_kept_blocks else ""
        raise NoRoom(ErrorCode.NO_KV_ROOM, f"{wanted} tokens of KV room needed, {room}{kept}")

    def _num_free_blocks(self, cache: int) -> int:
        """0 of a shard that was dropped."""
        return next((s.cache.pool.num_free_blocks for s in self._shards if id(s.cache) == cache), 0)


def _edits(opening: OpenSession, prompt_ids: Sequence[int]) -> LogitEdits | None:
    """Only the last stage picks tokens."""
    is_last_stage = opening.stage_index == len(opening.route) - 1
    if not is_last_stage or not LogitEdits.are_needed(opening.sampling):
        return None
    return LogitEdits(opening.sampling, prompt_ids, opening.num_output_tokens_before)
