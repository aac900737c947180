"""The engine process: reads commands from the node process, keeps the engine and its loader, reports back.

It lives no longer than the node process: the kernel kills it when the parent dies (Linux), and the end of the
socket pair stops it everywhere.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ledger.rate_card import RateCard, RateCardError
from node.engine.admission import MAX_NUM_SESSIONS
from node.engine.compile import LayerCompiler
from node.engine.device import (
    choose_device,
    default_memory_bytes,
    is_out_of_memory,
    measure_bytes_per_second,
    set_num_threads,
)
from node.engine.engine import Engine
from node.engine.loaded import LoadedShard
from node.engine.loader import check_room
from node.engine.messages import (
    LENGTH_BYTES,
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
    Message,
    MessageError,
    SetRateCard,
    SetStandings,
    SetTrust,
    ShardReady,
    ShardStats,
    Stop,
    decode,
    encode,
    read_length,
)
from node.engine.native.build import COMPILE_TIMEOUT_S, kernels_or_none
from node.engine.provision import provision
from node.engine.shard import Shard
from node.engine.weight_plan import plan_weights
from node.errors import UserError
from node.links.tls_links import TlsLinks
from node.models.errors import ModelError
from node.models.manifest import MAX_MANIFEST_BYTES, Manifest
from node.models.package import MANIFEST_FILE
from pod.identity import IdentityError, KeyPair

log = logging.getLogger(__name__)

PROGRESS_STEP_BYTES = 4 << 20
ANSWER_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1


class Pipe:
    """This end of the socket pair. Messages leave through a thread: the engine never waits to report."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._outgoing: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._write, name="engine-report", daemon=True).start()

    def send(self, message: Message) -> None:
        self._outgoing.put(message)

    def send_last(self, message: Message) -> None:
        """Before the process ends."""
        self._connection.sendall(encode(message))

    def read(self) -> Message | None:
        """None when the node process is gone."""
        prefix = self._read_exactly(LENGTH_BYTES)
        raw = self._read_exactly(read_length(prefix)) if prefix else b""
        return decode(raw) if raw else None

    def _read_exactly(self, num_bytes: int) -> bytes:
        pieces = bytearray()
        while len(pieces) < num_bytes:
            piece = self._connection.recv(num_bytes - len(pieces))
            if not piece:
                return b""
            pieces += piece
        return bytes(pieces)

    def _write(self) -> None:
        while True:
            try:
                self._connection.sendall(encode(self._outgoing.get()))
            except OSError:
                # The reader sees the same end of the pair and stops the process.
                return


class EngineProcess:
    def __init__(self, pipe: Pipe, config: Configure) -> None:
        """Raises UserError or OSError: bad key, no such device, address taken."""
        self._pipe = pipe
        self._device = choose_device(config.device)
        set_num_threads(config.num_threads or None)
        self._memory_bytes = config.memory_bytes or default_memory_bytes(self._device)
        self._used_bytes = 0
        key = KeyPair.load(Path(config.node_key_path))
        self._engine = Engine(
            key.public,
            config.pod,
            key.sign,
            lambda on_frame, on_link_down, on_head_down: TlsLinks(
                key, config.pod, config.data_listen, on_frame, on_link_down, on_head_down
            ),
            pipe.send,
            # The node process starts a new one; a live process with a dead loop would keep all waiting.
            on_crash=lambda: end_process(1),
            hidden_bits=config.hidden_bits,
            max_num_sessions=config.max_num_sessions or MAX_NUM_SESSIONS,
        )
        self._kernels = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-kernels").submit(
            kernels_or_none
        )
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-load")
        self._compiler = (
            LayerCompiler(Path(config.compile_dir), torch.get_num_threads()) if config.compile_dir else None
        )

    def run(self) -> None:
        """Until the node process says stop, or is gone."""
        self._engine.start()
        self._pipe.send(
            EngineReady(
                self._engine.links.data_address,
                str(self._device),
                self._memory_bytes,
                measure_bytes_per_second(self._device),
                torch.get_num_threads(),
            )
        )
        while (command := self._pipe.read()) is not None and not isinstance(command, Stop):
            self._obey(command)
        self._engine.stop()
        if self._compiler is not None:
            self._compiler.close()
        if isinstance(command, Stop):
            self._pipe.send_last(Done(command.request))

    def _obey(self, command: Message) -> None:
        match command:
            case LoadShard():
                self._loader.submit(self._reporting, command, self._load)
            case DropShard():
                # Behind the loads, so that a drop finds the shard that was ordered before it.
                self._loader.submit(self._reporting, command, self._drop)
            case SetTrust():
                self._reporting(command, self._set_trust)
            case SetRateCard():
                self._reporting(command, self._set_rate_card)
            case SetStandings():
                self._reporting(command, self._set_standings)
            case GetStats():
                self._reporting(command, self._stats)
            case _:
                raise MessageError(f"{type(command).__name__} is no command")

    def _reporting(self, command: Command, run: Callable[..., Message]) -> None:
        """Every command is answered, with one line when it failed."""
        try:
            self._pipe.send(run(command))
        except (UserError, RateCardError) as error:
            self._pipe.send(Failed(command.request, str(error)))
        except Exception as error:
            if is_out_of_memory(error):
                line = f"out of memory on {self._device}; the node goes on without"
                self._pipe.send(Failed(command.request, line))
                return
            log.exception("a command failed")
            self._pipe.send(Failed(command.request, f"the engine failed: {type(error).__name__}: {error}"))

    def _load(self, order: LoadShard) -> ShardReady:
        manifest = _read_manifest(Path(order.model_dir))
        paths = [Path(path) for path in order.weights]
        free_bytes = self._memory_bytes - self._used_bytes
        kernels = self._kernels.result(COMPILE_TIMEOUT_S) if self._device.type == "cpu" else None
        plan = plan_weights(
            manifest,
            paths,
            order.start_layer,
            order.end_layer,
            order.dtype,
            self._device,
            free_bytes,
            has_kernels=kernels is not None,
        )
        check_room(manifest.name, plan.num_bytes, free_bytes)
        loaded = provision(
            manifest,
            Path(order.model_dir),
            paths,
            order.start_layer,
            order.end_layer,
            plan.dtype,
            self._device,
            # Half of what is left: the other half is for the next shard.
            max_num_kv_bytes=(free_bytes - plan.num_bytes) // 2,
            progress=self._progress_of(order.request),
            max_num_weight_bytes=plan.num_bytes,
            max_num_bits=plan.max_num_bits,
            kernels=kernels,
        )
        self._used_bytes += _used_by(loaded)
        gc.freeze()
        self._engine.add_shard(loaded)
        if self._compiler is not None and isinstance(loaded.shard, Shard):
            self._compiler.submit(loaded.shard, Path(order.model_dir))
        return _ready(order.request, loaded, plan.weight_type)

    def _progress_of(self, request: int) -> Callable[[int, int], None]:
        reported_bytes = 0

        def report(bytes_done: int, bytes_total: int) -> None:
            nonlocal reported_bytes
            if bytes_done == bytes_total or bytes_done - reported_bytes >= PROGRESS_STEP_BYTES:
                reported_bytes = bytes_done
                self._pipe.send(LoadProgress(request, bytes_done, bytes_total))

        return report

    def _drop(self, order: DropShard) -> Message:
        drop = self._engine.drop_shard(order.model, order.start_layer, order.end_layer)
        dropped = drop.result(ANSWER_TIMEOUT_S)
        if dropped is None:
            return Failed(order.request, "there is no such shard")
        self._used_bytes -= _used_by(dropped)
        return Done(order.request)

    def _set_trust(self, order: SetTrust) -> Done:
        self._engine.links.set_trust(order.certificates)
        return Done(order.request)

    def _set_rate_card(self, order: SetRateCard) -> Done:
        self._engine.set_rate_card(RateCard.decode(order.rate_card))
        return Done(order.request)

    def _set_standings(self, order: SetStandings) -> Done:
        self._engine.set_standings(order.standings)
        return Done(order.request)

    def _stats(self, order: GetStats) -> EngineStats:
        shards = tuple(
            ShardStats(
                loaded.model,
                loaded.start_layer,
                loaded.end_layer,
                num_sessions,
                loaded.cache.num_free_tokens,
                loaded.cache.num_tokens,
                loaded.speed,
            )
            for loaded, num_sessions in self._engine.shards().result(ANSWER_TIMEOUT_S)
        )
        return EngineStats(order.request, shards, self._used_bytes)


def main(descriptor: int) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s engine %(levelname)s %(message)s")
    # Ctrl-C in a terminal reaches the whole group; the node process decides what it means.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent()
    pipe = Pipe(socket.socket(fileno=descriptor))
    config = pipe.read()
    if not isinstance(config, Configure):
        return 0
    try:
        process = EngineProcess(pipe, config)
    except (UserError, IdentityError) as error:
        pipe.send_last(Failed(0, str(error)))
        return 1
    except OSError as error:
        pipe.send_last(Failed(0, f"cannot listen on {config.data_listen}: {os.strerror(error.errno or 0)}"))
        return 1
    # What the libraries have made is here to stay: to look through it for garbage would stop every stream.
    gc.freeze()
    process.run()
    return 0


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _read_manifest(model_dir: Path) -> Manifest:
    path = model_dir / MANIFEST_FILE
    try:
        with path.open("rb") as file:
            return Manifest.decode(file.read(MAX_MANIFEST_BYTES + 1))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


def _ready(request: int, loaded: LoadedShard, weight_type: str) -> ShardReady:
    return ShardReady(
        request,
        loaded.model,
        loaded.start_layer,
        loaded.end_layer,
        weight_type,
        loaded.manifest.stage_num_parameters(loaded.start_layer, loaded.end_layer),
        loaded.num_weight_bytes,
        loaded.cache.num_tokens,
        loaded.speed,
    )


def _used_by(loaded: LoadedShard) -> int:
    return loaded.num_weight_bytes + loaded.num_kv_bytes


def end_process(code: int) -> None:
    """At once: daemon threads may be inside torch, and an orderly interpreter exit can wait on them."""
    logging.shutdown()
    os._exit(code)
