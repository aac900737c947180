"""What this machine serves: follows the plan, tells the engine what to load and drop, says how far it is.

One shard loads at a time. A shard the plan no longer names stays until the plan's own shards are all ready
somewhere, so that a move never leaves a gap. Knows the engine's client, not what the engine does inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from node.catalogue import Catalogue
from node.engine.client import EngineClient, EngineError, ShardSpec
from node.engine.messages import ShardReady
from node.placement.assignment import Assignment
from node.plan_book import PlanBook
from node.pod_state import PodState
from node.speed import Speed
from node.status import MAX_NUM_SPEEDS, ShardStatus

log = logging.getLogger(__name__)

RETRY_S = 10.0
# How long others are preferred for a model that could not be loaded here.
PROBLEM_S = 300.0
CHECK_EVERY_S = 5.0
# Requests that run over a shard the plan has moved away get this long to finish.
DRAIN_S = 30.0

Place = tuple[bytes, int, int]
"""(model, start_layer, end_layer)."""


@dataclass
class _Loading:
    place: Place
    name: str
    done_bytes: int = 0
    total_bytes: int = 0

    @property
    def per_mille(self) -> int:
        return min(999, 1000 * self.done_bytes // self.total_bytes) if self.total_bytes else 0


class Serving:
    """`run` until cancelled; `wake` when plan, roster or files changed."""

    def __init__(
        self,
        node: bytes,
        engine: EngineClient,
        catalogue: Catalogue,
        state: PodState,
        book: PlanBook,
        on_change: Callable[[], None],
    ) -> None:
        self._node = node
        self._engine = engine
        self._catalogue = catalogue
        self._state = state
        self._book = book
        self._on_change = on_change
        self._changed = asyncio.Event()
        self._loaded: dict[Place, ShardStatus] = {}
        self._speeds: dict[bytes, Speed] = {}
        self._loading: _Loading | None = None
        self._problems: dict[bytes, str] = {}
        self._retry_at_s: dict[Place, float] = {}
        self._avoid_until_s: dict[bytes, float] = {}
        self._unwanted_since_s: dict[Place, float] = {}
        self._is_engine_up = True

    def wake(self) -> None:
        self._changed.set()

    def shards(self) -> tuple[ShardStatus, ...]:
        """Ready ones, then the one on its way in."""
        loading = self._loading
        coming = (ShardStatus(*loading.place, loaded_per_mille=loading.per_mille),) if loading else ()
        return (*self._loaded.values(), *coming)

    def speeds(self) -> tuple[tuple[bytes, Speed], ...]:
        """Of models whose layers were loaded since the start; a drop does not make them unknown."""
        return tuple(self._speeds.items())

    def problems(self) -> tuple[tuple[bytes, str], ...]:
        return tuple(self._problems.items())

    def loading(self) -> Iterable[Mapping[str, object]]:
        """For progress bars."""
        if self._loading is not None and self._loading.total_bytes:
            loading = self._loading
            yield {
                "what": f"{loading.name}[{loading.place[1]}:{loading.place[2]})",
                "done_bytes": loading.done_bytes,
                "total_bytes": loading.total_bytes,
            }

    def engine_exited(self) -> None:
        """Nothing is served until the engine is back; its client loads the same shards again."""
        self._is_engine_up = False
        self._loaded.clear()
        self._on_change()

    def engine_restarted(self, shards: Iterable[ShardReady]) -> None:
        self._is_engine_up = True
        for ready in shards:
            self._put(ready)
        self._on_change()
        self.wake()

    def _put(self, ready: ShardReady) -> None:
        # The newest last: of more models than an advert names, the oldest are forgotten.
        self._speeds[ready.model] = ready.speed.or_head_of(self._speeds.pop(ready.model, None))
        while len(self._speeds) > MAX_NUM_SPEEDS:
            del self._speeds[next(iter(self._speeds))]
        self._loaded[(ready.model, ready.start_layer, ready.end_layer)] = ShardStatus(
            ready.model,
            ready.start_layer,
            ready.end_layer,
            microseconds_per_layer=ready.speed.decode_us[0],
            num_kv_tokens=ready.kv_capacity_tokens,
        )

    async def run(self) -> None:
        while True:
            self._changed.clear()
            self._forget_old_problems()
            if self._is_engine_up:
                await self._drop_unwanted()
            if not self._is_engine_up or not await self._load_next():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), CHECK_EVERY_S)

    def _forget_old_problems(self) -> None:
        """What failed once may be tried again, by whichever node the plan chooses then."""
        now_s = asyncio.get_running_loop().time()
        wanted = {place[0] for place in self._wanted()}
        for model in list(self._problems):
            is_over = now_s >= self._avoid_until_s.get(model, 0.0)
            if self._catalogue.get(model) is None or (model not in wanted and is_over):
                del self._problems[model]
                self._on_change()

    def _wanted(self) -> list[Place]:
        plan = self._book.plan
        mine: tuple[Assignment, ...] = plan.of_node(self._node) if plan is not None else ()
        return [(a.model, a.start_layer, a.end_layer) for a in mine if self._catalogue.get(a.model)]

    async def _load_next(self) -> bool:
        """Load one shard that is wanted and not here; False when there is nothing to do now."""
        now_s = asyncio.get_running_loop().time()
        for place in self._wanted():
            if place not in self._loaded and now_s >= self._retry_at_s.get(place, 0.0):
                await self._load(place)
                return True
        return False

    async def _load(self, place: Place) -> None:
        entry = self._catalogue.get(place[0])
        if entry is None or entry.weights is None:
            self._retry_at_s[place] = asyncio.get_running_loop().time() + CHECK_EVERY_S
            return
        model, start_layer, end_layer = place
        loading = self._loading = _Loading(place, entry.deployed.name)
        self._on_change()

        def progress(done_bytes: int, total_bytes: int) -> None:
            before = loading.per_mille // 50
            loading.done_bytes, loading.total_bytes = done_bytes, total_bytes
            if loading.per_mille // 50 != before:
                self._on_change()

        spec = ShardSpec(
            model_dir=self._catalogue.directory(model),
            weights=entry.weights,
            start_layer=start_layer,
            end_layer=end_layer,
            dtype=entry.manifest.dtype,
        )
        try:
            ready = await self._engine.load_shard(spec, progress)
        except EngineError as error:
            log.warning("layers [%d,%d) of %s: %s", start_layer, end_layer, entry.deployed.name, error)
            self._problems[model] = str(error)[:200]
            self._retry_at_s[place] = asyncio.get_running_loop().time() + RETRY_S
            self._avoid_until_s[model] = asyncio.get_running_loop().time() + PROBLEM_S
            await self._make_room(place)
        else:
            self._problems.pop(model, None)
            self._put(ready)
        finally:
            self._loading = None
            self._on_change()

    async def _make_room(self, for_place: Place) -> None:
        """A load failed: shards the plan does not name give way at once, and it is tried again."""
        unwanted = [place for place in self._loaded if place not in self._wanted()]
        for place in unwanted:
            await self._drop(place)
        if unwanted:
            self._retry_at_s.pop(for_place, None)

    async def _drop_unwanted(self) -> None:
        now_s = asyncio.get_running_loop().time()
        wanted = set(self._wanted())
        for place in list(self._loaded):
            if place in wanted:
                self._unwanted_since_s.pop(place, None)
            elif self._catalogue.get(place[0]) is None:
                await self._drop(place)
            elif self._is_plan_ready(place[0]):
                since_s = self._unwanted_since_s.setdefault(place, now_s)
                if now_s - since_s > DRAIN_S or not await self._num_sessions(place):
                    await self._drop(place)

    async def _num_sessions(self, place: Place) -> int:
        try:
            stats = await self._engine.stats()
        except EngineError:
            return 0
        return sum(s.num_sessions for s in stats.shards if (s.model, s.start_layer, s.end_layer) == place)

    def _is_plan_ready(self, model: bytes) -> bool:
        """Whether every shard the plan names for the model is ready on a live node."""
        plan, statuses, live = self._book.plan, self._state.statuses(), self._state.live()
        if plan is None:
            return False
        for assignment in plan.of_model(model):
            status = statuses.get(assignment.node)
            place = (assignment.model, assignment.start_layer, assignment.end_layer)
            if assignment.node not in live or status is None:
                return False
            if not any(s.ready and (s.model, s.start_layer, s.end_layer) == place for s in status.shards):
                return False
        return True

    async def _drop(self, place: Place) -> None:
        self._loaded.pop(place, None)
        self._unwanted_since_s.pop(place, None)
        self._on_change()
        try:
            await self._engine.drop_shard(*place)
        except EngineError as error:
            log.warning("dropping layers [%d,%d): %s", place[1], place[2], error)
