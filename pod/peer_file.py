"""The last addresses at which each node was known to listen, kept in a small JSON file across restarts. It is
a hint only: a damaged or missing file is the same as an empty one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pod.identity import IdentityError, node_of_peer_id, peer_id

MAX_NUM_ADDRESSES = 16
MAX_FILE_BYTES = 4 * 1024 * 1024


class PeerFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._addresses = _read(path)

    def addresses(self, node: bytes) -> Sequence[str]:
        return self._addresses.get(node, ())

    def nodes(self) -> Iterable[bytes]:
        return self._addresses.keys()

    def put(self, node: bytes, addresses: Sequence[str]) -> bool:
        """Whether that was news."""
        known = tuple(addresses[:MAX_NUM_ADDRESSES])
        if not known or self._addresses.get(node) == known:
            return False
        self._addresses[node] = known
        self._write()
        return True

    def _write(self) -> None:
        text = json.dumps({peer_id(node): list(known) for node, known in self._addresses.items()}, indent=1)
        fresh = self._path.with_suffix(".new")
        fresh.write_text(text)
        os.replace(fresh, self._path)


def _read(path: Path) -> dict[bytes, tuple[str, ...]]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return {}
        stored: object = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    found: dict[bytes, tuple[str, ...]] = {}
    for name, addresses in stored.items() if isinstance(stored, dict) else ():
        try:
            found[node_of_peer_id(name)] = tuple(str(address) for address in addresses)[:MAX_NUM_ADDRESSES]
        except (IdentityError, TypeError):
            continue
    return found
