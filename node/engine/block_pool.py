"""Which KV blocks are in use: references are counted, cached blocks kept until their room is needed.

A block without references is free, or idle when it is kept for the prefix cache: idle blocks are given away
last, the longest unused first. It knows numbers of blocks, nothing of tokens or sessions.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable


class BlockPool:
    """All operations take constant time per block, amortised. `on_evict` is told of each idle block given
    away.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.on_evict: Callable[[int], None] = lambda _: None
        self._num_references = array("i", bytes(4 * num_blocks))
        self._is_kept = bytearray(num_blocks)
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._num_empty = num_blocks
        # The lowest block on top. An entry may be stale: its block was taken as somebody's neighbour.
        self._stack = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free_blocks(self) -> int:
        """Idle ones included: `allocate` can have them."""
        return self._num_empty + len(self._idle)

    @property
    def num_idle_blocks(self) -> int:
        return len(self._idle)

    def num_references(self, block: int) -> int:
        return self._num_references[block]

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= self._num_empty + len(self._idle)

    def allocate(self, num_blocks: int, after: int = -1) -> array[int]:
        """Blocks with one reference each; neighbours of block `after` and of each other where possible."""
        assert self.can_allocate(num_blocks)
        blocks: array[int] = array("i")
        for _ in range(num_blocks):
            after = self._take_one(after + 1)
            blocks.append(after)
        return blocks

    def share(self, block: int) -> None:
        """One reference more, to a block in use or idle."""
        if self._num_references[block] == 0:
            del self._idle[block]
        self._num_references[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """One reference less each. Of idle ones, those that come first here are given away first."""
        for block in blocks:
            count = self._num_references[block] - 1
            assert count >= 0
            self._num_references[block] = count
            if count == 0 and self._is_kept[block]:
                self._idle[block] = None
            elif count == 0:
                self._num_empty += 1
                self._stack.append(block)
        if len(self._stack) > 2 * self.num_blocks + 64:
            self._stack = [block for block in range(self.num_blocks - 1, -1, -1) if self._is_empty(block)]

    def keep(self, block: int) -> None:
        """What this block (in use) holds is worth keeping when its last reference goes."""
        assert self._num_references[block] > 0
        self._is_kept[block] = 1

    def _is_empty(self, block: int) -> bool:
        return self._num_references[block] == 0 and not self._is_kept[block]

    def _take_one(self, wanted: int) -> int:
        if not (0 < wanted < self.num_blocks and self._is_empty(wanted)):
            wanted = self._pop_empty() if self._num_empty else self._evict()
        self._num_empty -= 1
        self._num_references[wanted] = 1
        return wanted

    def _pop_empty(self) -> int:
        while not self._is_empty(block := self._stack.pop()):
            pass
        return block

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        self._is_kept[block] = 0
        self._num_empty += 1
        self.on_evict(block)
        return block
