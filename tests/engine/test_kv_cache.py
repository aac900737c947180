"""The block pool against a model of it, and tables that grow: nothing leaked, nothing shared by mistake."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from node.engine.block_pool import BlockPool
from node.engine.kv_cache import BLOCK_TOKENS, BlockTable, KvCache
from node.engine.prefix_cache import PrefixCache
from node.engine.prefix_hashes import prefix_hashes

CPU = torch.device("cpu")
SCOPE = b"scope"


def make_cache(num_blocks: int) -> KvCache:
    cache = KvCache(0, 1, num_blocks, 1, 2, torch.float32, CPU)
    keys, _ = cache.layer(0)
    keys[:] = torch.arange(keys.shape[1])[None, :, None]
    return cache


def check(cache: KvCache, tables: list[BlockTable]) -> None:
    """Every block is referenced by the tables that hold it, and by nothing else."""
    held = Counter(block for table in tables for block in table.blocks)
    pool = cache.pool
    assert all(pool.num_references(block) == held[block] for block in range(pool.num_blocks))
    assert pool.num_free_blocks == pool.num_blocks - len(held)


@settings(max_examples=300, deadline=None)
@given(
    num_blocks=st.integers(1, 24),
    actions=st.lists(
        st.tuples(st.sampled_from(["open", "prefix", "grow", "truncate", "close"]), st.integers(0, 10**6)),
        max_size=80,
    ),
)
def test_no_block_is_leaked_or_shared_by_mistake(num_blocks: int, actions: list[tuple[str, int]]) -> None:
    cache, tables = make_cache(num_blocks), []
    for action, number in actions:
        table = tables[number % len(tables)] if tables else None
        match action:
            case "open":
                if cache.can_open(number % 90 + 1):
                    tables.append(cache.open(number % 90 + 1))
            case "prefix":
                # One of three prompts that begin alike; what of it is cached is shared.
                hashes = prefix_hashes(b"m", b"h", [7] * 32 + [number % 3] * 48)
                opened = cache.open_after(cache.prefixes.take(SCOPE, hashes), 80)
                if opened is not None:
                    tables.append(opened)
                    for hashed, block in zip(hashes[: number % 6], opened.blocks, strict=False):
                        cache.prefixes.add(SCOPE, hashed, block)
            case "grow" if table is not None:
                wanted = table.num_tokens + number % 40
                had_room = cache.pool.can_allocate(-(-wanted // BLOCK_TOKENS) - len(table.blocks))
                assert cache.grow(table, wanted) == had_room
                assert not had_room or table.num_tokens >= wanted
            case "truncate" if table is not None:
                cache.truncate(table, number % (table.num_tokens + 1))
            case "close" if table is not None:
                tables.remove(table)
                cache.close(table)
        check(cache, tables)
        for one in tables:
            expected = [block * BLOCK_TOKENS + i for block in one.blocks for i in range(BLOCK_TOKENS)]
            assert one.slots(0, one.num_tokens).tolist() == expected
            start = number % (one.num_tokens + 1)
            keys = one.gather(cache.layer(0)[0], start, one.num_tokens)
            assert keys[0, :, 0].tolist() == expected[start:]
    for table in tables:
        cache.close(table)
    assert cache.num_free_tokens == cache.num_tokens
    assert cache.can_open(cache.num_tokens)


def test_a_cached_block_is_found_again_and_given_away_last() -> None:
    pool = BlockPool(4)
    prefixes = PrefixCache(pool)
    hashes = prefix_hashes(b"m", b"h", range(32))
    first = pool.allocate(2)
    for hashed, block in zip(hashes, first, strict=True):
        prefixes.add(SCOPE, hashed, block)
    pool.free(reversed(first))
    assert (pool.num_free_blocks, pool.num_idle_blocks) == (4, 2)
    assert set(pool.allocate(2)).isdisjoint(first)
    assert list(prefixes.take(SCOPE, hashes)) == list(first)
    assert not prefixes.take(b"another head's", hashes)
    assert not pool.can_allocate(1)
    pool.free(reversed(first))
    # The end of the chain goes first: the beginning is of more use.
    assert list(pool.allocate(1)) == [first[1]]
    assert list(prefixes.take(SCOPE, hashes)) == [first[0]]
    pool.free([first[0]])
    pool.allocate(1)
    assert len(prefixes) == 0


def test_a_block_that_is_used_is_not_evicted() -> None:
    pool = BlockPool(2)
    prefixes = PrefixCache(pool)
    (hashed,) = prefix_hashes(b"m", b"h", range(16))
    (block,) = pool.allocate(1)
    prefixes.add(SCOPE, hashed, block)
    pool.allocate(1)
    assert not pool.can_allocate(1)
    with pytest.raises(AssertionError):
        pool.allocate(1)


def test_neighbours_are_preferred() -> None:
    pool = BlockPool(8)
    one = pool.allocate(2)
    other = pool.allocate(1, after=4)
    assert (list(one), list(other)) == ([0, 1], [5])
    assert list(pool.allocate(2, after=one[-1])) == [2, 3]
    assert list(pool.allocate(2, after=5)) == [6, 7]


def test_hashes_tell_prompts_models_and_heads_apart() -> None:
    ids = list(range(40))
    hashes = prefix_hashes(b"m", b"h", ids)
    assert len(hashes) == 2
    assert prefix_hashes(b"m", b"h", [*ids[:16], 99, *ids[17:]])[0] == hashes[0]
    assert prefix_hashes(b"m", b"h", [*ids[:16], 99, *ids[17:]])[1] != hashes[1]
    assert prefix_hashes(b"m", b"h", [99, *ids[1:]])[1] != hashes[1]
    assert not set(hashes) & {*prefix_hashes(b"n", b"h", ids), *prefix_hashes(b"m", b"i", ids)}
