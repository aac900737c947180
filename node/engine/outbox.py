"""Gathers what a step has to say, so that each next hop gets one frame per lane with all its sessions in it.

Decode rows and prefill chunks go to the same hop in separate frames, because a lane is a connection of its
own and a token must not wait behind a chunk. Knows frames and links, nothing of layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from node.engine.hidden_rows import are_8_bits_due, hidden_batch
from node.links.codec import FrameError
from node.links.frames import HiddenBatch, HiddenItem, Lane, TokenBatch, TokenItem
from node.links.port import LinkDown, LinkFull, StageLinks


@dataclass(frozen=True, slots=True)
class Lost:
    """A frame that could not be sent: these sessions cannot go on."""

    sessions: tuple[bytes, ...]
    reason: str


@dataclass(slots=True)
class _Rows:
    items: list[HiddenItem] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)


class Outbox:
    def __init__(self, links: StageLinks, hidden_bits: int = 16) -> None:
        """`hidden_bits` is how hidden states travel: 16, 8 or `AUTO_BITS`."""
        self._links = links
        self._hidden_bits = hidden_bits
        self._hidden: dict[tuple[bytes, Lane, int], _Rows] = defaultdict(_Rows)
        self._to_first: dict[bytes, list[TokenItem]] = defaultdict(list)
        self._to_head: dict[bytes, list[TokenItem]] = defaultdict(list)

    def add_hidden(self, node: bytes, lane: Lane, items: Sequence[HiddenItem], rows_TD: Tensor) -> None:
        """The rows of `items`, in their order."""
        batch = self._hidden[node, lane, rows_TD.shape[1]]
        batch.items.extend(items)
        batch.rows.append(rows_TD)

    def add_token(self, head: bytes, first_stage: bytes | None, item: TokenItem) -> None:
        """`first_stage` is None when the token goes no further than the head, as logprobs never do."""
        self._to_head[head].append(item)
        if first_stage is not None:
            bare = item if item.logprob is None else replace(item, logprob=None, top_logprobs=())
            self._to_first[first_stage].append(bare)

    def send(self) -> list[Lost]:
        """Everything gathered, once; what could not be sent comes back."""
        lost: list[Lost] = []
        for node, items in self._to_first.items():
            self._send(node, TokenBatch(tuple(items)), Lane.DECODE, items, lost)
        for head, items in self._to_head.items():
            try:
                self._links.send_to_head(head, TokenBatch(tuple(items)))
            except (LinkDown, LinkFull) as error:
                lost.append(Lost(tuple(item.session for item in items), f"the head is unreachable: {error}"))
        for (node, lane, _), batch in sorted(self._hidden.items(), key=lambda entry: entry[0][1]):
            is_8_bits = are_8_bits_due(self._hidden_bits, self._links.link_us(node))
            frame = hidden_batch(batch.items, batch.rows, is_8_bits)
            self._send(node, frame, lane, batch.items, lost)
        self._hidden.clear()
        self._to_first.clear()
        self._to_head.clear()
        return lost

    def _send(
        self,
        node: bytes,
        frame: HiddenBatch | TokenBatch,
        lane: Lane,
        items: Iterable[HiddenItem | TokenItem],
        lost: list[Lost],
    ) -> None:
        try:
            self._links.send(node, frame, lane)
        except (LinkDown, LinkFull, FrameError) as error:
            reason = f"the next stage is unreachable: {error}"
            lost.append(Lost(tuple(item.session for item in items), reason))
