"""The chain hash of each full block of a prompt: equal only where model, head and all ids so far are equal.

Made by the head, made again by the first stage, which has the ids. Pure; no torch, for the node process too.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b

from node.links.frames import PREFIX_BLOCK_TOKENS, PREFIX_HASH_BYTES

BLOCK_TOKENS = PREFIX_BLOCK_TOKENS
_PERSON = b"gpu-pod prefix"


def prefix_hashes(model: bytes, head: bytes, token_ids: Sequence[int]) -> tuple[bytes, ...]:
    """One per full block of `BLOCK_TOKENS`, in order."""
    ids = array("I", token_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    raw, num_block_bytes = ids.tobytes(), BLOCK_TOKENS * ids.itemsize
    hashed = blake2b(model + head, digest_size=PREFIX_HASH_BYTES, person=_PERSON).digest()
    hashes = []
    for start in range(0, len(raw) // num_block_bytes * num_block_bytes, num_block_bytes):
        block = hashed + raw[start : start + num_block_bytes]
        hashed = blake2b(block, digest_size=PREFIX_HASH_BYTES, person=_PERSON).digest()
        hashes.append(hashed)
    return tuple(hashes)
