"""Which block holds which full block of a prompt: found by chain hash, so that it need not be computed again.

A hash is only believed within a scope: the head that named it and the route up to this stage. Nobody else can
put rows in the way of another head's sessions. Blocks that no session uses stay until the pool needs them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from node.engine.block_pool import BlockPool
from node.links.frames import OpenSession

_Key = tuple[bytes, bytes]


class PrefixCache:
    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._blocks: dict[_Key, int] = {}
        self._keys: dict[int, _Key] = {}
        pool.on_evict = self._evicted

    def __len__(self) -> int:
        return len(self._blocks)

    def take(self, scope: bytes, hashes: Sequence[bytes]) -> array[int]:
        """The blocks of the longest known beginning, with one reference more each."""
        found: array[int] = array("i")
        for hashed in hashes:
            block = self._blocks.get((scope, hashed))
            if block is None:
                break
            self._pool.share(block)
            found.append(block)
        return found

    def add(self, scope: bytes, hashed: bytes, block: int) -> None:
        """`block`, in use, now holds the rows of `hashed`. The first that does is remembered."""
        key = (scope, hashed)
        if key not in self._blocks and block not in self._keys:
            self._blocks[key] = block
            self._keys[block] = key
            self._pool.keep(block)

    def _evicted(self, block: int) -> None:
        del self._blocks[self._keys.pop(block)]


def scope_of(opening: OpenSession) -> bytes:
    """Who answers for rows that get here: model, head, and nodes and layers up to and with this stage."""
    digest = blake2b(opening.model + opening.head, digest_size=16, person=b"gpu-pod scope")
    for stage in opening.route[: opening.stage_index + 1]:
        digest.update(stage.node)
        digest.update(stage.start_layer.to_bytes(4, "little") + stage.end_layer.to_bytes(4, "little"))
    return digest.digest()
