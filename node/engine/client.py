"""The node process's side of the engine: starts the process, orders shards, hears events, restarts it.

All on one asyncio loop, no torch. After a crash the engine comes back with the same trust, rate cards and
shards, on the same port, after a growing pause; requests that were waiting fail with EngineError.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from node.engine.events import ReceiptHeld, SessionEnded, WorkDisputed
from node.engine.messages import (
    LENGTH_BYTES,
    MAX_NUM_RATE_CARDS,
    MAX_NUM_STANDINGS,
    Command,
    Configure,
    Done,
    DropShard,
    EngineReady,
    EngineStats,
    Failed,
    GetStats,
    LoadProgress,
    LoadShard,
    MemberStanding,
    Message,
    MessageError,
    SetRateCard,
    SetStandings,
    SetTrust,
    ShardReady,
    Stop,
    decode,
    encode,
    read_length,
)
from node.errors import UserError

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
LOAD_TIMEOUT_S = 3600.0
ANSWER_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
MIN_RESTART_PAUSE_S = 0.2
MAX_RESTART_PAUSE_S = 10.0
STEADY_S = 30.0


class EngineError(UserError):
    """The engine refused or failed; `str()` is one line for people."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """None: the engine decides. `log_path` takes the engine's stderr; None leaves it with the node's.
    `compile_dir` keeps compiled layers; None: none are compiled.
    """

    node_key_path: Path
    pod: bytes
    data_listen: str
    device: str = "auto"
    memory_bytes: int | None = None
    num_threads: int | None = None
    log_path: Path | None = None
    compile_dir: Path | None = None
    hidden_bits: int = 16
    max_num_sessions: int | None = None


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """`model_dir` is an installed package; `dtype` "auto" lets the device decide."""

    model_dir: Path
    weights: tuple[Path, ...]
    start_layer: int
    end_layer: int
    dtype: str = "auto"

    @property
    def key(self) -> tuple[str, int, int]:
        return str(self.model_dir), self.start_layer, self.end_layer


@dataclass(frozen=True, slots=True)
class EngineExited:
    """The process is gone; a new one follows. All its sessions are lost."""

    reason: str


@dataclass(frozen=True, slots=True)
class EngineRestarted:
    """It is back and listens; `shards` are loaded again, `failed` could not be."""

    ready: EngineReady
    shards: tuple[ShardReady, ...]
    failed: tuple[str, ...]


EngineEvent = ReceiptHeld | SessionEnded | WorkDisputed | EngineExited | EngineRestarted
OnProgress = Callable[[int, int], None]


class EngineClient:
    def __init__(self, config: EngineConfig, on_event: Callable[[EngineEvent], None]) -> None:
        self._config = config
        self._on_event = on_event
        self._process: Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._reloading: asyncio.Task[None] | None = None
        self._next_request = 1
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._on_progress: dict[int, OnProgress] = {}
        self._shards: dict[tuple[str, int, int], tuple[ShardSpec, bytes]] = {}
        self._certificates: tuple[bytes, ...] = ()
        self._rate_cards: dict[bytes, None] = {}
        self._standings: tuple[MemberStanding, ...] = ()
        self._is_stopping = False

    @property
    def process_id(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self) -> EngineReady:
        """Raises EngineError: no such device, address taken, key unreadable."""
        reader, ready = await self._launch()
        self._supervisor = asyncio.create_task(self._supervise(reader), name="engine-supervisor")
        return ready

    async def load_shard(self, spec: ShardSpec, on_progress: OnProgress | None = None) -> ShardReady:
        """Raises EngineError: damaged files, not enough memory, the engine died."""
        ready = await self._load(spec, on_progress)
        self._shards[spec.key] = (spec, ready.model)
        return ready

    async def drop_shard(self, model: bytes, start_layer: int, end_layer: int) -> None:
        """Sessions on it end. Raises EngineError when there is no such shard."""
        for key, (spec, of_model) in list(self._shards.items()):
            if (of_model, spec.start_layer, spec.end_layer) == (model, start_layer, end_layer):
                del self._shards[key]
        await self._ask(DropShard(self._number(), model, start_layer, end_layer), ANSWER_TIMEOUT_S)

    async def set_trust(self, certificates: Sequence[bytes]) -> None:
        """DER certificates of the roster's nodes; links to all others are cut."""
        self._certificates = tuple(certificates)
        await self._ask(SetTrust(self._number(), self._certificates), ANSWER_TIMEOUT_S)

    async def set_rate_card(self, rate_card: bytes) -> None:
        """A version (encoded) that sessions may be opened with; the oldest said gives way."""
        self._rate_cards.pop(rate_card, None)
        self._rate_cards[rate_card] = None
        while len(self._rate_cards) > MAX_NUM_RATE_CARDS:
            del self._rate_cards[next(iter(self._rate_cards))]
        await self._ask(SetRateCard(self._number(), rate_card), ANSWER_TIMEOUT_S)

    async def set_standings(self, standings: Sequence[MemberStanding]) -> None:
        """What every member weighs and which nodes are whose; before the trust that lets those nodes in."""
        self._standings = tuple(standings[:MAX_NUM_STANDINGS])
        await self._ask(SetStandings(self._number(), self._standings), ANSWER_TIMEOUT_S)

    async def stats(self) -> EngineStats:
        stats = await self._ask(GetStats(self._number()), ANSWER_TIMEOUT_S)
        assert isinstance(stats, EngineStats)
        return stats

    async def stop(self) -> None:
        """Ends its sessions, then the process; kills it when it does not go."""
        self._is_stopping = True
        try:
            await self._ask(Stop(self._number()), STOP_TIMEOUT_S)
        except EngineError as error:
            log.info("the engine did not stop by itself: %s", error)
        await self._end_process()
        tasks = [task for task in (self._supervisor, self._reloading) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # A restart that was under way has left a process of its own.
        await self._end_process()

    # The process.

    async def _launch(self) -> tuple[asyncio.StreamReader, EngineReady]:
        ours, theirs = socket.socketpair()
        log_file = self._config.log_path.open("ab") if self._config.log_path is not None else None
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "node.engine",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                # torch's idle threads would spin for milliseconds on the cores that the kernels need.
                env={"OMP_WAIT_POLICY": "passive", **os.environ},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
            )
        finally:
            theirs.close()
            if log_file is not None:
                log_file.close()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._writer.write(encode(_configure(self._config)))
        try:
            first = await asyncio.wait_for(_read(reader), START_TIMEOUT_S)
        except (TimeoutError, MessageError) as error:
            await self._end_process()
            raise EngineError("the engine did not start in time") from error
        if not isinstance(first, EngineReady):
            await self._end_process()
            raise EngineError(first.message if isinstance(first, Failed) else "the engine died as it started")
        # A restarted engine must be reached where the first one was.
        self._config = replace(self._config, data_listen=first.data_address)
        return reader, first

    async def _supervise(self, reader: asyncio.StreamReader) -> None:
        pause_s = MIN_RESTART_PAUSE_S
        while True:
            started_s = time.monotonic()
            await self._hear(reader)
            reason = await self._end_process()
            self._fail_waiting(reason)
            if self._is_stopping:
                return
            self._on_event(EngineExited(reason))
            if time.monotonic() - started_s > STEADY_S:
                pause_s = MIN_RESTART_PAUSE_S
            while True:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_RESTART_PAUSE_S)
                try:
                    reader, ready = await self._launch()
                    break
                except EngineError as error:
                    log.warning("the engine did not come back: %s", error)
            # The reloading needs answers, which the next round of this loop hears.
            self._reloading = asyncio.create_task(self._reload(ready), name="engine-reload")
            self._reloading.add_done_callback(_log_failure)

    async def _reload(self, ready: EngineReady) -> None:
        failed, shards = [], []
        await self._ask(SetStandings(self._number(), self._standings), ANSWER_TIMEOUT_S)
        await self._ask(SetTrust(self._number(), self._certificates), ANSWER_TIMEOUT_S)
        for rate_card in tuple(self._rate_cards):
            await self._ask(SetRateCard(self._number(), rate_card), ANSWER_TIMEOUT_S)
        for spec, _ in list(self._shards.values()):
            try:
                shards.append(await self._load(spec, None))
            except EngineError as error:
                failed.append(str(error))
        self._on_event(EngineRestarted(ready, tuple(shards), tuple(failed)))

    async def _end_process(self) -> str:
        """Make sure it is gone; say how it ended."""
        process, self._process = self._process, None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if process is None:
            return "the engine was not running"
        try:
            code = await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            code = await process.wait()
        return (
            f"the engine was killed by signal {-code}" if code < 0 else f"the engine exited with code {code}"
        )

    # Requests and what is heard.

    async def _load(self, spec: ShardSpec, on_progress: OnProgress | None) -> ShardReady:
        order = LoadShard(
            self._number(),
            str(spec.model_dir),
            tuple(str(path) for path in spec.weights),
            spec.start_layer,
            spec.end_layer,
            spec.dtype,
        )
        if on_progress is not None:
            self._on_progress[order.request] = on_progress
        try:
            ready = await self._ask(order, LOAD_TIMEOUT_S)
        finally:
            self._on_progress.pop(order.request, None)
        assert isinstance(ready, ShardReady)
        return ready

    def _number(self) -> int:
        self._next_request += 1
        return self._next_request

    async def _ask(self, command: Command, timeout_s: float) -> Message:
        if self._writer is None:
            raise EngineError("the engine is not running")
        future = asyncio.get_running_loop().create_future()
        self._waiting[command.request] = future
        try:
            self._writer.write(encode(command))
            answer: Message = await asyncio.wait_for(future, timeout_s)
        except TimeoutError as error:
            raise EngineError(f"the engine did not answer within {timeout_s:.0f} s") from error
        finally:
            self._waiting.pop(command.request, None)
        if isinstance(answer, Failed):
            raise EngineError(answer.message)
        return answer

    async def _hear(self, reader: asyncio.StreamReader) -> None:
        """Until the pair closes."""
        while True:
            try:
                message = await _read(reader)
            except MessageError:
                log.exception("the engine speaks nonsense")
                return
            match message:
                case None:
                    return
                case LoadProgress():
                    if message.request in self._on_progress:
                        self._on_progress[message.request](message.bytes_done, message.bytes_total)
                case ReceiptHeld() | SessionEnded() | WorkDisputed():
                    self._on_event(message)
                case Done() | Failed() | ShardReady() | EngineStats():
                    future = self._waiting.get(message.request)
                    if future is not None and not future.done():
                        future.set_result(message)

    def _fail_waiting(self, reason: str) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(EngineError(reason))


async def _read(reader: asyncio.StreamReader) -> Message | None:
    """None when the engine is gone. Raises MessageError."""
    try:
        prefix = await reader.readexactly(LENGTH_BYTES)
        return decode(await reader.readexactly(read_length(prefix)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _configure(config: EngineConfig) -> Configure:
    return Configure(
        str(config.node_key_path),
        config.pod,
        config.data_listen,
        config.device,
        config.memory_bytes or 0,
        config.num_threads or 0,
        str(config.compile_dir or ""),
        config.hidden_bits,
        config.max_num_sessions or 0,
    )


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("the engine's shards were not reloaded: %s", error)
