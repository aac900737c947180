"""A node without the model's files is a full gateway: config and tokenizer come from others, checked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from node.catalogue import Catalogue
from node.models.package import ModelPackage, build_package
from pod.canonical import DecodeError, encode
from pod.roster.roster import Model

Answer = Callable[[bytes, bytes], Awaitable[bytes]]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    return build_package("smollm2-135m", "auto", tmp_path_factory.mktemp("models"))


def deployed(package: ModelPackage, reference: str = "smollm2-135m", num_stages: int = 0) -> Model:
    manifest = package.manifest
    return Model("small", reference, manifest.model_id, manifest.encode(), num_stages, "auto")


def catalogue(directory: Path, serving: bool, answer: Answer | None = None) -> Catalogue:
    async def ask(peer: bytes, _kind: str, payload: bytes, _timeout_s: float) -> bytes:
        assert answer is not None
        return await answer(peer, payload)

    return Catalogue(directory, serving, ask, lambda: [b"peer"] if answer is not None else [])


def test_a_bundle_comes_from_another_node_and_the_tokenizer_works(
    package: ModelPackage, tmp_path: Path
) -> None:
    async def run() -> None:
        source = catalogue(package.directory.parent, serving=True)
        source.set_deployed({"small": deployed(package)})
        assert await source.look_for_files()
        target = catalogue(tmp_path, False, source.answer_bundle)
        target.set_deployed({"small": deployed(package, reference="/not/here.gguf")})
        assert not target.has_looked
        assert await target.look_for_files()
        assert target.has_looked
        entry = target.find("small")
        assert entry is not None
        assert entry.has_bundle
        assert entry.weights is None
        tokenizer = target.tokenizer(entry.deployed.id)
        assert tokenizer.decode(tokenizer.encode("Paris")) == "Paris"

    asyncio.run(run())


def test_a_bundle_that_arrives_changed_is_not_installed(package: ModelPackage, tmp_path: Path) -> None:
    async def run() -> None:
        source = catalogue(package.directory.parent, serving=True)
        source.set_deployed({"small": deployed(package)})
        await source.look_for_files()

        async def changed(peer: bytes, payload: bytes) -> bytes:
            piece = await source.answer_bundle(peer, payload)
            return bytes([piece[0] ^ 1]) + piece[1:]

        target = catalogue(tmp_path, False, changed)
        target.set_deployed({"small": deployed(package, reference="/not/here.gguf")})
        await target.look_for_files()
        entry = target.find("small")
        assert entry is not None
        assert not entry.has_bundle
        assert "/not/here.gguf" in entry.problem

    asyncio.run(run())


@pytest.mark.parametrize("payload", [b"", b"\xff", b"x" * 2000])
def test_questions_that_make_no_sense_are_refused(package: ModelPackage, payload: bytes) -> None:
    source = catalogue(package.directory.parent, serving=True)
    source.set_deployed({"small": deployed(package)})
    with pytest.raises(DecodeError):
        asyncio.run(source.answer_bundle(b"peer", payload))


def test_only_files_of_the_manifest_are_given_away(package: ModelPackage) -> None:
    source = catalogue(package.directory.parent, serving=True)
    source.set_deployed({"small": deployed(package)})
    asyncio.run(source.look_for_files())
    model = package.manifest.model_id
    assert asyncio.run(source.answer_bundle(b"peer", encode([model, "config.json", 0])))
    for question in (
        [model, "../config.json", 0],
        [model, "manifest.cbor", 0],
        [b"m" * 32, "config.json", 0],
        [1, 2, 3],
    ):
        assert asyncio.run(source.answer_bundle(b"peer", encode(question))) == b""


def test_a_reference_that_cannot_be_looked_at_is_a_problem_not_a_failure(
    package: ModelPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("node.catalogue.ensure_weights", refuse)
    monkeypatch.setattr("node.catalogue.build_package", refuse)
    target = catalogue(tmp_path, True)
    target.set_deployed({"small": deployed(package)})
    asyncio.run(target.look_for_files())
    entry = target.find("small")
    assert entry is not None
    assert entry.weights is None
    assert "Permission denied" in entry.problem


def test_deploying_again_takes_over_the_new_wish_and_keeps_the_files(package: ModelPackage) -> None:
    target = catalogue(package.directory.parent, True)
    target.set_deployed({"small": deployed(package)})
    asyncio.run(target.look_for_files())
    target.set_deployed({"small": deployed(package, num_stages=3)})
    entry = target.find("small")
    assert entry is not None
    assert entry.deployed.num_stages == 3
    assert entry.weights is not None
    renamed = replace(deployed(package), name="other")
    target.set_deployed({"other": renamed})
    assert target.find("small") is None
    assert target.find("other") is not None
