"""Compiling the kernels for this machine's CPU, once: the library is kept in the user's cache directory.

Its name is a digest of the sources, the flags and everything the compiler defines for this CPU, so that
another machine, compiler or version gets a library of its own. No compiler, no kernels: nothing else changes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import platformdirs

from node.engine.native.abi import Kernels

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
COMPILERS = ("c++", "g++", "clang++")
COMPILE_TIMEOUT_S = 300.0
FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
MACHINE = platform.machine()
_CPU_FLAG = "-mcpu=native" if MACHINE in ("arm64", "aarch64") else "-march=native"


class NoKernels(Exception):
    """Why there are none, in one line."""


def cache_dir() -> Path:
    return Path(platformdirs.user_cache_dir("gpu-pod")) / "kernels"


def load_kernels(directory: Path | None = None) -> Kernels:
    """Compiled by now or from earlier. Raises NoKernels."""
    directory = directory or cache_dir()
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise NoKernels("no C++ compiler (g++ or clang++) is installed")
    path = directory / f"{_digest(compiler)}.so"
    try:
        if path.exists():
            try:
                return Kernels(path)
            except OSError as error:
                log.warning("the kernels kept from earlier are damaged: %s", error)
        _compile(compiler, path)
        return Kernels(path)
    except OSError as error:
        raise NoKernels(f"the kernels cannot be kept or loaded: {error}") from error


def kernels_or_none() -> Kernels | None:
    """Without them everything works, more slowly: one line says why."""
    try:
        return load_kernels()
    except NoKernels as error:
        log.warning("no C++ kernels, the layers run in torch: %s", error)
        return None


def _digest(compiler: str) -> str:
    """Of all that decides what comes out."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update(repr((FLAGS, _CPU_FLAG, sys.platform)).encode())
    digest.update(_run([compiler, _CPU_FLAG, "-dM", "-E", "-x", "c++", os.devnull]).encode())
    return digest.hexdigest()


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    started_s = time.monotonic()
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    built = Path(name)
    try:
        _run([compiler, _CPU_FLAG, *FLAGS, "-o", str(built), str(SOURCES / "kernels.cpp")])
        # Another process may have been as quick: whoever is last, the file is whole.
        built.replace(path)
    finally:
        built.unlink(missing_ok=True)
    log.info("compiled the kernels in %.1f s", time.monotonic() - started_s)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - a compiler found on the path and our own sources
            command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernels(f"the compiler cannot be run: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise NoKernels(f"the compiler failed: {lines[0]}")
    return done.stdout
