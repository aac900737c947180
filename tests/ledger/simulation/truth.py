"""What really happened in a simulation, which no node knows whole: work, promises."""

from __future__ import annotations

from dataclasses import dataclass, field

from ledger.rate_card import price
from tests.ledger.simulation.people import CARD
from tests.ledger.world import NUM_PARAMETERS

# (head, session, stage index, stage)
WorkPlace = tuple[bytes, bytes, int, bytes]


@dataclass(frozen=True, slots=True)
class Work:
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int

    def price(self) -> int:
        return price(
            CARD,
            NUM_PARAMETERS,
            self.num_prompt_tokens,
            self.num_cached_tokens,
            self.num_output_tokens,
        )


@dataclass
class Truth:
    """`promised`: author and hash of entries whose writing was reported: they may never be lost again.

    `forbidden`: hashes of entries that no honest node may ever take in.
    `held` and `payers` are those of the sessions of honest heads, by head and session.
    """

    work: dict[WorkPlace, Work] = field(default_factory=dict)
    held: dict[tuple[bytes, bytes], int] = field(default_factory=dict)
    payers: dict[tuple[bytes, bytes], bytes] = field(default_factory=dict)
    promised: set[tuple[bytes, bytes]] = field(default_factory=set)
    forbidden: set[bytes] = field(default_factory=set)
    num_crashes: int = 0
    num_lies: int = 0
