"""One node of a simulated pod: a real ledger over a disk that outlives it, and what it knows till it dies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ledger.directory import Directory
from ledger.ledger import Ledger
from ledger.receipt import Receipt, SignedReceipt
from tests.ledger.simulation.durable import Crash, Disk
from tests.ledger.world import POD, Key

Place = tuple[bytes, bytes, int]


@dataclass
class Session:
    """One request of an honest head: (stage index, node's number) per stage, tokens computed so far."""

    id: bytes
    payer: bytes
    stages: tuple[int, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int = 0
    sequence: int = 0
    signed: dict[int, Receipt] = field(default_factory=dict)
    co_signed: dict[int, SignedReceipt] = field(default_factory=dict)


class SimulatedNode:
    """`sessions` are its own as head, `held` the receipts it co-signed as a stage; a crash forgets both."""

    def __init__(
        self,
        number: int,
        key: Key,
        member: bytes,
        skew_ms: int,
        disk: Disk,
        directory: Directory,
        clock_ms: Callable[[], int],
        crash: Callable[[], Crash | None],
    ) -> None:
        self.number = number
        self.key = key
        self.member = member
        self.skew_ms = skew_ms
        self._disk = disk
        self._directory = directory
        self._clock_ms = clock_ms
        self._crash = crash
        self.num_lives = 0
        self.start()

    def start(self) -> None:
        """A new process over what was durable."""
        self.num_lives += 1
        self.sessions: dict[bytes, Session] = {}
        self.held: dict[Place, SignedReceipt] = {}
        self.ledger = Ledger(
            self._disk.open(self._crash),  # type: ignore[arg-type]
            POD,
            self._directory,
            self.key.public,
            self.key.sign,
            self.now_ms,
        )

    def now_ms(self) -> int:
        return self._clock_ms() + self.skew_ms

    def stop(self) -> None:
        self._disk.close()
