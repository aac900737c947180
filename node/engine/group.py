"""Sessions that can run in one pass: the same layers of the same shard, in routes of the same length."""

from __future__ import annotations

from dataclasses import dataclass, field

from node.engine.loaded import LoadedShard
from node.engine.pace import Pace
from node.speed import DECODE_ROWS


@dataclass(slots=True, eq=False)
class Group:
    """`num_decoding` of its `num_sessions` are past their prompt and not paused."""

    loaded: LoadedShard
    start_layer: int
    end_layer: int
    num_stages: int
    num_sessions: int = 0
    num_decoding: int = 0
    pace: Pace = field(init=False)

    def __post_init__(self) -> None:
        loaded, num_layers = self.loaded, self.end_layer - self.start_layer
        speed = loaded.speed
        decode_ns = {
            rows: speed.layer_ns(rows) * num_layers + (speed.head_ns(rows) if self.is_last else 0)
            for rows in DECODE_ROWS
        }
        self.pace = Pace(
            decode_ns[1] / 1e9,
            speed.prefill_ns_per_token * num_layers / 1e9,
            {rows: ns / 1e9 for rows, ns in decode_ns.items()},
        )

    @property
    def is_first(self) -> bool:
        return self.start_layer == 0

    @property
    def is_last(self) -> bool:
        return self.end_layer == self.loaded.manifest.num_layers

    @property
    def max_num_decodes(self) -> int:
        """Of one step. The first stage lets out so many that every stage has some to work on at a time."""
        if self.num_stages == 1 or not self.is_first:
            return self.num_decoding
        return -(-self.num_decoding // self.num_stages)
