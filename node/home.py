"""The state directory of one node, `$POD_HOME`: where each thing lives, and who may use it now.

Knows paths, the lock and the note a running node leaves for its own command line. Knows nothing of what the
files mean: keys and roster belong to `pod`, the books to `ledger`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from node.errors import UserError

HOME_VARIABLE = "POD_HOME"
COMMAND_WAIT_S = 5.0
_POD_FILES = (
    "keys",
    "joining",
    "roster.log",
    "peers.json",
    "plan.cbor",
    "database",
    "restored",
    "ledger.sqlite*",
    "node.log*",
    "engine.log",
)


@dataclass(frozen=True, slots=True)
class RunningNode:
    """What a running node writes down so that `pod` commands on the same machine can reach it.

    `api_url` is what others use; `local_url` the same over plain HTTP, on loopback only.
    """

    pid: int
    api_url: str
    local_token: str
    local_url: str = ""


class PodHome:
    """Paths below one state directory; created on first use, readable by its owner only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / "lock")

    @classmethod
    def locate(cls, environment: Mapping[str, str]) -> PodHome:
        given = environment.get(HOME_VARIABLE)
        return cls(Path(given).expanduser() if given else Path(platformdirs.user_data_dir("gpu-pod")))

    @property
    def keys_dir(self) -> Path:
        return self.path / "keys"

    @property
    def models_dir(self) -> Path:
        return self.path / "models"

    @property
    def roster_file(self) -> Path:
        return self.path / "roster.log"

    @property
    def plan_file(self) -> Path:
        return self.path / "plan.cbor"

    @property
    def log_file(self) -> Path:
        return self.path / "node.log"

    @property
    def default_ledger_url(self) -> str:
        return f"sqlite:///{self.path / 'ledger.sqlite'}"

    @property
    def ledger_url(self) -> str:
        """The database that `--db` once named, else a file in this directory. Raises UserError."""
        file = self._database_file
        try:
            url = file.read_text().strip()
        except FileNotFoundError:
            return self.default_ledger_url
        except (OSError, UnicodeDecodeError):
            raise UserError(f"{file}, which names the ledger's database, cannot be read") from None
        if not url:
            # Whoever goes on with another database writes a second journal under the same key: a fork.
            raise UserError(f"{file}, which names the ledger's database, is empty; write its URL there")
        return url

    def remember_database(self, url: str) -> None:
        self._write_private(self._database_file, url + "\n")

    @property
    def _database_file(self) -> Path:
        return self.path / "database"

    @property
    def _running_file(self) -> Path:
        return self.path / "running.json"

    def has_pod(self) -> bool:
        """True when this directory already belongs to a pod (one directory, one pod)."""
        return self.roster_file.exists()

    def check_has_no_pod(self) -> None:
        """Raises UserError."""
        if self.has_pod():
            raise UserError(
                f"{self.path} is in a pod already; `pod leave` first or set another {HOME_VARIABLE}"
            )

    def prepare(self) -> None:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.models_dir.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot use {self.path} as {HOME_VARIABLE}: {error.strerror}") from None

    def identity_files(self) -> list[Path]:
        """The files without which this node is nobody: what a backup holds beside the journal."""
        found = [self.roster_file, *sorted(self.keys_dir.glob("*")), self.path / "peers.json"]
        return [path for path in found if path.is_file()]

    @property
    def is_restored(self) -> bool:
        """From a backup, and its node has not begun a new journal yet."""
        return self._restored_file.exists()

    def mark_restored(self, restored: bool = True) -> None:
        if restored:
            self._write_private(self._restored_file, "")
        else:
            self._restored_file.unlink(missing_ok=True)

    @property
    def next_key_file(self) -> Path:
        return self.keys_dir / "node.next.pem"

    def adopt_next_key(self, old_node: bytes) -> None:
        """The next key becomes the node's own. Of two crashes in between, each leaves what can go on."""
        self._write_private(self._retired_file, old_node.hex())
        self.next_key_file.replace(self.keys_dir / "node.pem")
        self.mark_restored(False)

    def retired_nodes(self) -> set[bytes]:
        """Ids of keys this node had before."""
        try:
            return {bytes.fromhex(self._retired_file.read_text())}
        except (OSError, ValueError):
            return set()

    def forget_retired(self) -> None:
        self._retired_file.unlink(missing_ok=True)

    @property
    def _retired_file(self) -> Path:
        return self.keys_dir / "retired"

    @property
    def _restored_file(self) -> Path:
        return self.path / "restored"

    def take_over(self, other: PodHome) -> None:
        """Move all of another directory's pod here, where none is. It counts once the roster is here."""
        self.forget_pod()
        own = other._own_files()
        for path in sorted(own, key=lambda path: path == other.roster_file):
            path.rename(self.path / path.name)

    def aside_dir(self) -> Path:
        """Where `set_aside` will put what is here now."""
        return self.path / f"left-{time.strftime('%Y%m%d-%H%M%S')}"

    def set_aside(self, target: Path | None = None) -> Path:
        """Move keys, roster and books of the pod that was left out of the way; the models stay."""
        target = target or self.aside_dir()
        target.mkdir(mode=0o700)
        for path in self._own_files():
            path.rename(target / path.name)
        return target

    def forget_pod(self) -> None:
        """Undo a creation that failed halfway: nothing of it is worth keeping, and it may be tried again."""
        for path in self._own_files():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _own_files(self) -> list[Path]:
        """What belongs to this directory's pod; other people's files in it are left alone."""
        return sorted(path for pattern in _POD_FILES for path in self.path.glob(pattern))

    def acquire(self) -> None:
        """Take the directory for this process; the lock goes with the process, also after kill -9.

        Waits a little: a command may be using it right now. Raises UserError.
        """
        self.prepare()
        if not self.try_acquire(0 if self.running_node() is not None else COMMAND_WAIT_S):
            raise UserError(
                f"{self.path} is in use by a running node; stop it first or set another {HOME_VARIABLE}"
            )

    def acquire_for_new_pod(self) -> None:
        """The same where no pod is. Looked at under the lock too: another command may have been faster."""
        self.check_has_no_pod()
        self.acquire()
        try:
            self.check_has_no_pod()
        except UserError:
            self.release()
            raise

    def try_acquire(self, timeout_s: float = 0) -> bool:
        try:
            self._lock.acquire(timeout=timeout_s)
        except Timeout:
            return False
        # Left by a node that was killed: its token is nobody's now.
        self._running_file.unlink(missing_ok=True)
        return True

    def release(self) -> None:
        self._running_file.unlink(missing_ok=True)
        self._lock.release()

    def announce_running(self, api_url: str, local_url: str = "") -> RunningNode:
        """Called by the node that holds the lock, once its API listens."""
        running = RunningNode(os.getpid(), api_url, secrets.token_urlsafe(32), local_url or api_url)
        self._write_private(self._running_file, json.dumps(asdict(running)))
        return running

    @staticmethod
    def _write_private(path: Path, text: str) -> None:
        """Readable by its owner only, from the first moment on; the old content or the new, never half."""
        temporary = path.with_suffix(".new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        temporary.replace(path)

    def running_node(self) -> RunningNode | None:
        """The node that runs on this directory now, or None. A note left by a killed node counts as none."""
        try:
            note = json.loads(self._running_file.read_text())
            api_url, local_url = str(note["api_url"]), str(note["local_url"])
            running = RunningNode(int(note["pid"]), api_url, str(note["local_token"]), local_url)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not self.try_acquire():
            return running
        self._lock.release()
        return None
