"""A throwaway PostgreSQL cluster for tests: its own directory, a Unix socket, no port, gone afterwards."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import psycopg

COMMAND_TIMEOUT_S = 60
USER = "pod"


class NoPostgresqlError(Exception):
    """It is not installed on this machine."""


@dataclass
class Cluster:
    """`directory` holds the data and the socket; `programs` is where initdb and postgres are."""

    directory: Path
    programs: Path
    _numbers: Iterator[int] = field(default_factory=count)
    _server: subprocess.Popen[bytes] | None = None

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"ledger_{next(self._numbers)}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self._url(name).replace("postgresql://", "postgresql+psycopg://")

    def _url(self, database: str) -> str:
        return f"postgresql://{USER}@/{database}?host={self.directory}"

    def start(self) -> None:
        """A child that ends with this process, however this process ends."""
        settings = {"listen_addresses": "", "unix_socket_directories": str(self.directory), "fsync": "off"}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._server = subprocess.Popen(
            [self.programs / "postgres", "-D", str(self._data), *options],
            stdin=subprocess.DEVNULL,
            stdout=(self.directory / "log").open("ab"),
            stderr=subprocess.STDOUT,
            cwd=self.directory,
            preexec_fn=_die_with_parent,
            **_account(),
        )
        deadline_s = time.monotonic() + COMMAND_TIMEOUT_S
        while True:
            try:
                psycopg.connect(self._url("postgres")).close()
                return
            except psycopg.OperationalError:
                has_ended = self._server.poll() is not None
                assert not has_ended, (self.directory / "log").read_text()
                assert time.monotonic() < deadline_s, "PostgreSQL does not start"
                time.sleep(0.05)

    def stop(self) -> None:
        """At once, as a crash would."""
        assert self._server is not None
        self._server.send_signal(signal.SIGQUIT)
        self._server.wait(COMMAND_TIMEOUT_S)

    def create(self) -> None:
        self._run("initdb", "-D", str(self._data), "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync")

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self.programs / program, *arguments],
            check=False,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=COMMAND_TIMEOUT_S,
            cwd=self.directory,
            **_account(),
        )
        assert done.returncode == 0, f"{program}: {done.stdout}"


def _account() -> dict[str, Any]:
    """PostgreSQL refuses to run as root."""
    return {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}


def _die_with_parent() -> None:
    """Where the system can: a test run that is killed leaves no server behind."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGQUIT)


def _programs() -> Path:
    found = [Path(path).parent for path in (shutil.which("initdb"),) if path]
    # Debian keeps them out of the path, one directory per version; a link in the path points there.
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for directory in found:
        if (directory / "initdb").exists() and (directory / "postgres").exists():
            return directory
    raise NoPostgresqlError("PostgreSQL is not installed; run tests/ledger/install-postgresql.sh as root")


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A running cluster. Raises NoPostgresqlError."""
    programs = _programs()
    # A short path: that of a Unix socket has at most 107 characters.
    directory = Path(tempfile.mkdtemp(prefix="pod-pg-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(directory, "postgres", "postgres")
        made = Cluster(directory, programs)
        made.create()
        made.start()
        try:
            yield made
        finally:
            made.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
