"""Admission by KV room: a session comes in when its prompt and a little more fit; the rest is found later.

What has been refused for room after being preempted comes before new requests: so much is left for it, for
as long as its head keeps asking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

from ledger.rate_card import RateCard
from node.engine.kv_cache import BLOCK_TOKENS, BlockTable, KvCache, num_blocks_for
from node.engine.loaded import LoadedShard
from node.engine.meter import Meter
from node.engine.opening import Refusal, find_shard, packed_ids
from node.engine.prefix_cache import scope_of
from node.engine.sampling_edits import LogitEdits
from node.engine.session import StageSession, max_num_tokens
from node.engine.session_book import SessionBook
from node.links.frames import ErrorCode, OpenSession

MAX_NUM_SESSIONS = 4096
MAX_NUM_SESSIONS_PER_HEAD = 1024
MAX_SESSION_MS = 3600_000
# A head asks again within a quarter of a second.
OWED_MS = 600
NUM_SPARE_TOKENS = BLOCK_TOKENS


class Admission:
    def __init__(
        self,
        node: bytes,
        pod: bytes,
        book: SessionBook,
        shards: Sequence[LoadedShard],
        rate_cards: dict[int, RateCard],
        clock_ms: Callable[[], int],
    ) -> None:
        """`shards` and `rate_cards` are the engine's own, as they change."""
        self._node = node
        self._pod = pod
        self._book = book
        self._shards = shards
        self._rate_cards = rate_cards
        self._clock_ms = clock_ms
        # A cache that is dropped takes what is owed with it.
        self._owed: WeakKeyDictionary[KvCache, tuple[int, int]] = WeakKeyDictionary()

    def admit(self, peer: bytes, opening: OpenSession) -> StageSession:
        """Check everything, then take KV room. Raises Refusal; the caller puts the session in the book."""
        if (num_open := self._book.num_of_head[peer]) >= MAX_NUM_SESSIONS_PER_HEAD:
            raise Refusal(ErrorCode.NO_KV_ROOM, f"{num_open} sessions of this head are open here already")
        if (num_open := len(self._book.sessions)) >= MAX_NUM_SESSIONS:
            raise Refusal(ErrorCode.NO_KV_ROOM, f"{num_open} sessions are open here already")
        loaded = find_shard(opening, self._node, peer, self._shards)
        rate_card = self._rate_cards.get(opening.rate_card_version)
        if rate_card is None:
            # The newest may be on its way here: the head tries others, then this stage again.
            raise Refusal(ErrorCode.UNKNOWN_SHARD, f"rate card {opening.rate_card_version} is not known here")
        now_ms = self._clock_ms()
        if opening.deadline_ms <= now_ms:
            raise Refusal(ErrorCode.DEADLINE, "the session's deadline has passed")
        scope = scope_of(opening)
        table, num_cached_tokens = self._take_room(loaded.cache, opening, scope, now_ms)
        stage = opening.route[opening.stage_index]
        num_parameters = loaded.manifest.stage_num_parameters(stage.start_layer, stage.end_layer)
        kept = replace(opening, prompt_ids=())
        return StageSession(
            opening=kept,
            loaded=loaded,
            group=self._book.group(loaded, stage.start_layer, stage.end_layer, len(opening.route)),
            table=table,
            meter=Meter(kept, self._pod, num_parameters, rate_card),
            end_ms=min(opening.deadline_ms, now_ms + MAX_SESSION_MS),
            prompt_ids=packed_ids(opening.prompt_ids),
            scope=scope,
            num_cached_tokens=num_cached_tokens,
            number=self._book.next_number(),
            edits=_edits(opening),
        )

    def _take_room(
        self, cache: KvCache, opening: OpenSession, scope: bytes, now_ms: int
    ) -> tuple[BlockTable, int]:
        """The table, and how many tokens of it are in the cache already: never the whole prompt."""
        most = max_num_tokens(opening)
        if most > cache.num_tokens:
            raise Refusal(
                ErrorCode.KV_BUDGET_TOO_SMALL,
                f"{most} tokens of KV room may be needed, this stage has {cache.num_tokens} in all",
            )
        wanted = min(most, opening.num_prompt_tokens + NUM_SPARE_TOKENS)
        is_replay = opening.num_output_tokens_before > 0
        num_owed_blocks = 0 if is_replay else self._num_owed_blocks(cache, now_ms)
        num_reusable = (opening.num_prompt_tokens - 1) // BLOCK_TOKENS
        cached = cache.prefixes.take(scope, opening.prefix_hashes[:num_reusable])
        num_new_blocks = num_blocks_for(wanted) - len(cached)
        if cache.pool.can_allocate(num_new_blocks + num_owed_blocks):
            table = cache.open_after(cached, wanted)
            assert table is not None
            if is_replay:
                self._owed.pop(cache, None)
            return table, len(cached) * BLOCK_TOKENS
        cache.pool.free(reversed(cached))
        if is_replay:
            self._owed[cache] = num_blocks_for(wanted), now_ms + OWED_MS
        room = f"{cache.num_free_tokens} of {cache.num_tokens} are free"
        owed = f", {num_owed_blocks * BLOCK_TOKENS} for who waits longer" if num_owed_blocks else ""
        raise Refusal(ErrorCode.NO_KV_ROOM, f"{wanted} tokens of KV room needed, {room}{owed}")

    def _num_owed_blocks(self, cache: KvCache, now_ms: int) -> int:
        num_blocks, until_ms = self._owed.get(cache, (0, 0))
        if until_ms <= now_ms:
            self._owed.pop(cache, None)
            return 0
        return num_blocks


def _edits(opening: OpenSession) -> LogitEdits | None:
    """Only the last stage picks tokens."""
    is_last_stage = opening.stage_index == len(opening.route) - 1
    if not is_last_stage or not LogitEdits.are_needed(opening.sampling):
        return None
    return LogitEdits(opening.sampling, opening.prompt_ids, opening.num_output_tokens_before)
