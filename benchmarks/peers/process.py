"""A peer's program as a child process, asked in JSON lines. Knows where `install.sh` puts the peers."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2] / ".bench"
PROGRAMS = Path(__file__).parent
LLAMA_LIBRARIES = ROOT / "llama-build" / "bin"
LLAMA_PYTHON = ROOT / "llama" / "bin" / "python"
VLLM_PYTHON = ROOT / "vllm" / "bin" / "python"
EXPORTED = ROOT / "smollm2-135m"
LOGS = ROOT / "logs"

LOAD_TIMEOUT_S = 600.0
ANSWER_TIMEOUT_S = 300.0


class PeerError(Exception):
    """The peer is not installed, does not answer, or says that it failed: one line."""


class PeerProcess:
    """`name` also names the log. Raises PeerError when it does not load."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        if not Path(command[0]).exists():
            raise PeerError("not installed")
        LOGS.mkdir(parents=True, exist_ok=True)
        self._log = LOGS / f"run-{name}.log"
        start_s = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("wb"),
            env={**os.environ, **(environment or {})},
            text=True,
        )
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._answer(LOAD_TIMEOUT_S)
        except PeerError:
            self.stop()
            raise
        self.started_s = time.perf_counter() - start_s

    def ask(self, operation: str, **arguments: object) -> dict[str, float]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"operation": operation, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise PeerError(self._last_words()) from None
        return self._answer(ANSWER_TIMEOUT_S)

    def memory_bytes(self) -> int:
        """Resident, with its children."""
        process = psutil.Process(self._process.pid)
        return sum(each.memory_info().rss for each in [process, *process.children(recursive=True)])

    def stop(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _answer(self, timeout_s: float) -> dict[str, float]:
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self.stop()
            raise PeerError(f"no answer in {timeout_s:.0f} s") from None
        if not line:
            raise PeerError(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(str(answer["error"])[:200])
        return dict(answer["result"])

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        return f"ended with {self._process.returncode}: {lines[-1][:150] if lines else 'no word'}"


def llama(model: Path, num_threads: int, rpc_servers: tuple[str, ...] = ()) -> PeerProcess:
    if not (LLAMA_LIBRARIES / "libllama.so").exists():
        raise PeerError("not installed")
    command = [str(LLAMA_PYTHON), str(PROGRAMS / "run_llama.py"), str(model), str(num_threads), *rpc_servers]
    return PeerProcess("llama-rpc" if rpc_servers else "llama", command, _llama_environment(num_threads))


@contextlib.contextmanager
def llama_rpc_servers(num_servers: int) -> Iterator[tuple[str, ...]]:
    """Its RPC servers on loopback with one thread each; their addresses."""
    program = LLAMA_LIBRARIES / "ggml-rpc-server"
    if not program.exists():
        raise PeerError("not installed")
    LOGS.mkdir(parents=True, exist_ok=True)
    ports = [_free_port() for _ in range(num_servers)]
    servers = [
        subprocess.Popen(
            [str(program), "--host", "127.0.0.1", "--port", str(port), "--threads", "1", "--device", "CPU"],
            env=_llama_environment(1),
            stdout=subprocess.DEVNULL,
            stderr=(LOGS / f"run-rpc-server-{number}.log").open("wb"),
        )
        for number, port in enumerate(ports)
    ]
    try:
        for port in ports:
            _wait_until_listening(port)
        yield tuple(f"127.0.0.1:{port}" for port in ports)
    finally:
        for server in servers:
            server.kill()
            server.wait()


def vllm(num_threads: int) -> PeerProcess:
    if not VLLM_PYTHON.exists():
        raise PeerError("not installed")
    _export()
    # Its kernels are compiled by whatever stands in the path of its own environment.
    path = f"{VLLM_PYTHON.parent}{os.pathsep}{os.environ['PATH']}"
    command = [str(VLLM_PYTHON), str(PROGRAMS / "run_vllm.py"), str(EXPORTED), str(num_threads)]
    return PeerProcess("vllm", command, {"PATH": path, "OMP_NUM_THREADS": str(num_threads)})


def transformers(num_threads: int, dtype: str) -> PeerProcess:
    _export()
    command = [
        sys.executable,
        str(PROGRAMS / "run_transformers.py"),
        str(EXPORTED),
        str(num_threads),
        dtype,
    ]
    return PeerProcess(f"transformers-{dtype}", command, {"OMP_NUM_THREADS": str(num_threads)})


def _export() -> None:
    """In a process of its own: it leaves a gigabyte behind."""
    if (EXPORTED / "config.json").is_file():
        return
    command = [sys.executable, "-m", "benchmarks.peers.export", str(EXPORTED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_TIMEOUT_S, check=False)
    if done.returncode:
        raise PeerError(f"the weights could not be exported: {done.stderr.strip()[-200:]}")


def _llama_environment(num_threads: int) -> dict[str, str]:
    libraries = str(LLAMA_LIBRARIES)
    return {
        "LLAMA_CPP_LIB_PATH": libraries,
        "LD_LIBRARY_PATH": libraries,
        "OMP_NUM_THREADS": str(num_threads),
    }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _wait_until_listening(port: int, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline_s:
                raise PeerError("its RPC server does not listen") from None
            time.sleep(0.1)
