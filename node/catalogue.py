"""The catalogue: the pod's deployed models as this node knows them - manifest, bundle, weights, tokenizer.

For each model in the roster it installs the bundle (from the reference, else from another node) and looks for
the weights on this machine. What is missing is said, never fatal: the node still routes to others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from node.models.errors import ModelError
from node.models.manifest import Manifest
from node.models.package import (
    MANIFEST_FILE,
    MAX_BUNDLE_FILE_BYTES,
    build_package,
    ensure_weights,
    package_dir,
    write_bundle,
)
from node.models.tokenizer import ChatTokenizer
from pod.canonical import decode, encode
from pod.roster.roster import Model

log = logging.getLogger(__name__)

BUNDLE_KIND = "bundle"
PIECE_BYTES = 128 * 1024
MAX_QUESTION_BYTES = 1024
REQUEST_TIMEOUT_S = 10.0
BUNDLE_TIMEOUT_S = 120.0
RETRY_S = 15.0
MAX_NUM_TOKENIZERS = 16

AskPeer = Callable[[bytes, str, bytes, float], Awaitable[bytes]]
"""`ask(peer, kind, payload, timeout_s)`; raises an exception when there is no answer."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One deployed model. `weights` is None while they are not (yet) found here; `problem` says why."""

    deployed: Model
    manifest: Manifest
    has_bundle: bool = False
    weights: tuple[Path, ...] | None = None
    problem: str = ""


class Catalogue:
    """`refresh` follows the roster; look-ups are immediate. Everything slow runs on threads."""

    def __init__(
        self, models_dir: Path, serving: bool, ask: AskPeer, peers: Callable[[], Iterable[bytes]]
    ) -> None:
        self._models_dir = models_dir
        self._serving = serving
        self._ask = ask
        self._peers = peers
        self._entries: dict[bytes, Entry] = {}
        self._names: dict[str, bytes] = {}
        self._tokenizers: dict[bytes, ChatTokenizer] = {}
        self._retry_at_s: dict[bytes, float] = {}

    @property
    def has_looked(self) -> bool:
        """Whether every deployed model's files were looked for at least once."""
        return self._entries.keys() <= self._retry_at_s.keys()

    def find(self, name: str) -> Entry | None:
        model = self._names.get(name)
        return self._entries.get(model) if model is not None else None

    def get(self, model: bytes) -> Entry | None:
        return self._entries.get(model)

    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._entries.values())

    def directory(self, model: bytes) -> Path:
        """Where the model's manifest and bundle are on this machine."""
        return package_dir(model, self._models_dir)

    def tokenizer(self, model: bytes) -> ChatTokenizer:
        """Raises ModelError when the bundle is not here yet. Blocking: call it on a thread."""
        known = self._tokenizers.get(model)
        if known is None:
            entry = self._entries[model]
            known = ChatTokenizer(package_dir(model, self._models_dir), entry.manifest.eos_token_ids)
            while len(self._tokenizers) >= MAX_NUM_TOKENIZERS:
                self._tokenizers.pop(next(iter(self._tokenizers)))
            self._tokenizers[model] = known
        return known

    def set_deployed(self, models: Mapping[str, Model]) -> None:
        """Take over the roster's models; entries that stay keep what was found for them."""
        entries: dict[bytes, Entry] = {}
        for deployed in models.values():
            known = self._entries.get(deployed.id)
            if known is not None:
                entries[deployed.id] = replace(known, deployed=deployed)
                continue
            try:
                manifest = Manifest.decode(deployed.manifest)
            except ModelError as error:
                log.warning("model %s: %s", deployed.name, error)
                continue
            if manifest.model_id == deployed.id:
                entries[deployed.id] = Entry(deployed, manifest)
        for gone in self._retry_at_s.keys() - entries.keys():
            del self._retry_at_s[gone]
        self._entries = entries
        self._names = {deployed.name: deployed.id for deployed in models.values() if deployed.id in entries}

    async def look_for_files(self) -> bool:
        """One pass over what is missing: bundles, then weights. Returns whether anything changed."""
        changed, had_looked = False, self.has_looked
        now_s = asyncio.get_running_loop().time()
        for entry in self.entries():
            is_complete = entry.has_bundle and (entry.weights is not None or not self._serving)
            if is_complete or now_s < self._retry_at_s.get(entry.deployed.id, 0.0):
                continue
            found = await self._find_files(entry)
            if found != entry and self._entries.get(entry.deployed.id) is entry:
                self._entries[entry.deployed.id] = found
                changed = True
            self._retry_at_s[entry.deployed.id] = asyncio.get_running_loop().time() + RETRY_S
        return changed or self.has_looked != had_looked

    async def _find_files(self, entry: Entry) -> Entry:
        problem, weights, has_bundle = "", entry.weights, entry.has_bundle
        if not has_bundle:
            has_bundle, problem = await self._install_bundle(entry)
        if self._serving and weights is None:
            reference, manifest = entry.deployed.reference, entry.manifest
            try:
                weights = await asyncio.to_thread(ensure_weights, manifest, reference, self._models_dir)
            except (ModelError, OSError) as error:
                problem = str(error)
                if entry.problem != problem:
                    log.warning("model %s is not served from here: %s", entry.deployed.name, error)
        return Entry(entry.deployed, entry.manifest, has_bundle, weights, problem)

    async def _install_bundle(self, entry: Entry) -> tuple[bool, str]:
        model = entry.deployed.id
        if (package_dir(model, self._models_dir) / MANIFEST_FILE).is_file():
            return True, ""
        for peer in self._peers():
            try:
                async with asyncio.timeout(BUNDLE_TIMEOUT_S):
                    contents = {
                        file.name: await self._fetch(peer, model, file.name, file.size_bytes)
                        for file in entry.manifest.bundle
                    }
                await asyncio.to_thread(write_bundle, entry.manifest, contents, self._models_dir)
            except Exception as error:
                log.info("bundle of %s not from %s: %s", entry.deployed.name, peer.hex()[:8], error)
                continue
            return True, ""
        try:
            reference, dtype = entry.deployed.reference, entry.manifest.dtype
            package = await asyncio.to_thread(build_package, reference, dtype, self._models_dir)
        except (ModelError, OSError) as error:
            return False, str(error)
        if package.manifest.model_id != model:
            return False, f"{entry.deployed.reference} is another model on this machine"
        return True, ""

    async def _fetch(self, peer: bytes, model: bytes, name: str, size_bytes: int) -> bytes:
        """One bundle file in pieces; the digest is checked when it is written."""
        if size_bytes > MAX_BUNDLE_FILE_BYTES:
            raise ModelError(f"{name} is larger than {MAX_BUNDLE_FILE_BYTES} bytes")
        raw = bytearray()
        while len(raw) < size_bytes:
            question = encode([model, name, len(raw)])
            piece = await self._ask(peer, BUNDLE_KIND, question, REQUEST_TIMEOUT_S)
            if len(piece) != min(PIECE_BYTES, size_bytes - len(raw)):
                raise ModelError(f"{name} ended at {len(raw)} of {size_bytes} bytes")
            raw += piece
        return bytes(raw)

    async def answer_bundle(self, _peer: bytes, payload: bytes) -> bytes:
        """Another node asks for a piece of a bundle file; nothing but files named in the manifest."""
        match decode(payload, MAX_QUESTION_BYTES):
            case [bytes(model), str(name), int(offset)] if offset >= 0:
                pass
            case _:
                return b""
        entry = self._entries.get(model)
        if entry is None or not entry.has_bundle:
            return b""
        if name not in {file.name for file in entry.manifest.bundle}:
            return b""
        return await asyncio.to_thread(_read_piece, package_dir(model, self._models_dir) / name, offset)


def _read_piece(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(PIECE_BYTES)
