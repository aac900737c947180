"""The paged KV cache: fixed blocks of token slots, a pool that counts references, a block table per session.

Blocks are handed out in one contiguous run where the pool has one, so that attention reads a slice and not a
gather. It knows token slots, not sessions or layers' meaning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

BLOCK_TOKENS = 16


class BlockPool:
    """Which blocks are in use, by reference count (at most 255 each)."""

    def __init__(self, num_blocks: int) -> None:
        self._num_references = bytearray(num_blocks)
        self.num_free_blocks = num_blocks

    @property
    def num_blocks(self) -> int:
        return len(self._num_references)

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= self.num_free_blocks

    def allocate(self, num_blocks: int) -> tuple[int, ...]:
        """One run of neighbours if there is one, else the lowest free blocks."""
        assert self.can_allocate(num_blocks)
        start = self._num_references.find(bytes(num_blocks))
        if start >= 0:
            blocks = tuple(range(start, start + num_blocks))
        else:
            free = (block for block, count in enumerate(self._num_references) if count == 0)
            blocks = tuple(block for block, _ in zip(free, range(num_blocks), strict=False))
        for block in blocks:
            self._num_references[block] = 1
        self.num_free_blocks -= num_blocks
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            assert self._num_references[block] > 0
            self._num_references[block] -= 1
            self.num_free_blocks += self._num_references[block] == 0


class BlockTable:
    """Where the tokens of one session lie: token `i` is in block `blocks[i // BLOCK_TOKENS]`."""

    def __init__(self, blocks: tuple[int, ...], device: torch.device) -> None:
        self.blocks = blocks
        self._first_slot = blocks[0] * BLOCK_TOKENS
        self._is_run = blocks == tuple(range(blocks[0], blocks[0] + len(blocks)))
        starts = torch.tensor(blocks, device=device)[:, None] * BLOCK_TOKENS
        self._slots = (starts + torch.arange(BLOCK_TOKENS, device=device)).flatten()

    @property
    def num_tokens(self) -> int:
        return len(self.blocks) * BLOCK_TOKENS

    def slots(self, start: int, end: int) -> torch.Tensor:
        """The slots of tokens `[start, end)`."""
        return self._slots[start:end]

    def gather(self, cache_HSD: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """`[heads, end - start, head_dim]` of a layer's keys or values; a view when the blocks are a run."""
        if self._is_run:
            return cache_HSD[:, self._first_slot + start : self._first_slot + end]
        return cache_HSD.index_select(1, self._slots[start:end])


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

    @property
    def num_free_tokens(self) -> int:
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

    def close(self, table: BlockTable) -> None:
        self.pool.free(table.blocks)


def num_blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)
