"""A throwaway PostgreSQL cluster for tests: its own directory, a Unix socket, no port, gone afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import psycopg

COMMAND_TIMEOUT_S = 60
USER = "pod"


class NoPostgresqlError(Exception):
    """It is not installed on this machine."""


@dataclass
class Cluster:
    """`directory` holds the data and the socket; `programs` is where initdb and pg_ctl are."""

    directory: Path
    programs: Path
    _numbers: Iterator[int] = field(default_factory=count)

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"ledger_{next(self._numbers)}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self._url(name).replace("postgresql://", "postgresql+psycopg://")

    def _url(self, database: str) -> str:
        return f"postgresql://{USER}@/{database}?host={self.directory}"

    def start(self) -> None:
        settings = f"-c listen_addresses='' -c unix_socket_directories='{self.directory}' -c fsync=off"
        self._run(
            "pg_ctl", "start", "-w", "-D", str(self._data), "-l", str(self.directory / "log"), "-o", settings
        )

    def stop(self) -> None:
        """At once, as a crash would."""
        self._run("pg_ctl", "stop", "-D", str(self._data), "-m", "immediate")

    def create(self) -> None:
        self._run("initdb", "-D", str(self._data), "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync")

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _run(self, program: str, *arguments: str) -> None:
        # PostgreSQL refuses to run as root.
        account = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        done = subprocess.run(
            [self.programs / program, *arguments],
            check=False,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if program == "initdb" else subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            timeout=COMMAND_TIMEOUT_S,
            cwd=self.directory,
            **account,
        )
        assert done.returncode == 0, f"{program}: {done.stdout}"


def _programs() -> Path:
    found = [Path(path).parent for path in (shutil.which("initdb"),) if path]
    # Debian keeps them out of the path, one directory per version; a link in the path points there.
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for directory in found:
        if (directory / "initdb").exists() and (directory / "pg_ctl").exists():
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
