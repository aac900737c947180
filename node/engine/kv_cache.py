"""The paged KV cache: keys and values in fixed blocks of token slots; a block table per session, which grows.

It knows token slots and which are free, not sessions or what a layer means.
"""

from __future__ import annotations

from array import array

import torch

from node.engine.block_pool import BlockPool
from node.engine.prefix_cache import PrefixCache
from node.engine.prefix_hashes import BLOCK_TOKENS as BLOCK_TOKENS


class BlockTable:
    """Where the tokens of one session lie: token `i` is in block `blocks[i // BLOCK_TOKENS]`.

    Native code reads `blocks` (C ints) by its address during a step and keeps no view: it moves as it grows.
    """

    def __init__(self, blocks: array[int], device: torch.device) -> None:
        self.blocks = blocks
        self._device = device
        self._num_in_run = _num_in_run(blocks)
        self._slots = torch.empty(0, dtype=torch.int64, device=device)
        self._num_slotted_blocks = 0

    @property
    def num_tokens(self) -> int:
        return len(self.blocks) * BLOCK_TOKENS

    def extend(self, blocks: array[int]) -> None:
        if self._num_in_run == len(self.blocks):
            self._num_in_run += _num_in_run(blocks, self.blocks[-1] + 1 if self.blocks else None)
        self.blocks.extend(blocks)

    def truncate(self, num_blocks: int) -> array[int]:
        """Keep the first `num_blocks`; the others, last first."""
        dropped = self.blocks[num_blocks:]
        del self.blocks[num_blocks:]
        dropped.reverse()
        self._num_in_run = min(self._num_in_run, num_blocks)
        self._num_slotted_blocks = min(self._num_slotted_blocks, num_blocks)
        return dropped

    def slots(self, start: int, end: int) -> torch.Tensor:
        """The slots of tokens `[start, end)`."""
        if self._num_slotted_blocks * BLOCK_TOKENS < end:
            self._add_slots()
        return self._slots[start:end]

    def gather(self, cache_HSD: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """`[heads, end - start, head_dim]` of a layer's keys or values; a view when the blocks are a run."""
        if 0 < end <= self._num_in_run * BLOCK_TOKENS:
            first_slot = self.blocks[0] * BLOCK_TOKENS
            return cache_HSD[:, first_slot + start : first_slot + end]
        return cache_HSD.index_select(1, self.slots(start, end))

    def _add_slots(self) -> None:
        """Slots of the new blocks, in memory that doubles."""
        known, wanted = self._num_slotted_blocks * BLOCK_TOKENS, self.num_tokens
        if wanted > len(self._slots):
            grown = torch.empty(max(wanted, 2 * len(self._slots)), dtype=torch.int64, device=self._device)
            grown[:known] = self._slots[:known]
            self._slots = grown
        new = torch.tensor(self.blocks[self._num_slotted_blocks :], device=self._device)
        offsets = torch.arange(BLOCK_TOKENS, device=self._device)
        self._slots[known:wanted] = (new[:, None] * BLOCK_TOKENS + offsets).flatten()
        self._num_slotted_blocks = len(self.blocks)


class KvCache:
    """Keys and values `[kv_heads, slots, head_dim]` for each layer from `start_layer` on, and their pool."""

    def __init__(
        self,
        start_layer: int,
        end_layer: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (end_layer - start_layer, num_kv_heads, num_blocks * BLOCK_TOKENS, head_dim)
        self._start_layer = start_layer
        self._device = device
        # Uninitialised on purpose: on the CPU, pages cost memory only once a session has written to them.
        self._keys_LHSD = torch.empty(shape, dtype=dtype, device=device)
        self._values_LHSD = torch.empty(shape, dtype=dtype, device=device)
        self.pool = BlockPool(num_blocks)
        self.prefixes = PrefixCache(self.pool)

    @property
    def num_free_tokens(self) -> int:
        """What is cached and used by no session counts as free."""
        return self.pool.num_free_blocks * BLOCK_TOKENS

    @property
    def num_tokens(self) -> int:
        return self.pool.num_blocks * BLOCK_TOKENS

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = layer - self._start_layer
        return self._keys_LHSD[index], self._values_LHSD[index]

    def can_open(self, num_tokens: int) -> bool:
        return self.pool.can_allocate(num_blocks_for(num_tokens))

    def open(self, num_tokens: int) -> BlockTable:
        return BlockTable(self.pool.allocate(num_blocks_for(num_tokens)), self._device)

    def open_after(self, cached: array[int], num_tokens: int) -> BlockTable | None:
        """A table that begins with `cached` blocks, already referenced, and has room for `num_tokens`.

        None when there is no room; the references are then given back.
        """
        num_new = num_blocks_for(num_tokens) - len(cached)
        if not self.pool.can_allocate(num_new):
            self.pool.free(reversed(cached))
            return None
        new = self.pool.allocate(num_new, cached[-1] if cached else -1)
        return BlockTable(cached + new, self._device)

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Room for `num_tokens` in all. False, and nothing done, when there is none."""
        num_new = num_blocks_for(num_tokens) - len(table.blocks)
        if num_new <= 0:
            return True
        if not self.pool.can_allocate(num_new):
            return False
        table.extend(self.pool.allocate(num_new, table.blocks[-1] if table.blocks else -1))
        return True

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Keep the blocks that hold the first `num_tokens`."""
        self.pool.free(table.truncate(num_blocks_for(num_tokens)))

    def close(self, table: BlockTable) -> None:
        self.pool.free(table.truncate(0))


def num_blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)


def _num_in_run(blocks: array[int], due: int | None = None) -> int:
    """How many of `blocks`, from the first on, are neighbours (`due` is where the first should stand)."""
    num = 0
    for block in blocks:
        if due is not None and block != due:
            break
        num, due = num + 1, block + 1
    return num
