"""References, manifests, packages, bundles and the tokenizer: what is refused, and what stays equal."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.models.bundle import SUPPORTED_MODEL_TYPES, ModelFacts, make_bundle_here
from node.models.errors import ModelError
from node.models.manifest import FileDigest, Manifest, PackedSizes
from node.models.package import (
    ModelPackage,
    build_package,
    ensure_weights,
    load_package,
    package_dir,
    read_bundle,
    write_bundle,
)
from node.models.reference import resolve
from node.models.tokenizer import ChatTokenizer

MANIFEST = Manifest(
    name="m",
    model_type="llama",
    hidden_size=8,
    vocab_size=10,
    max_context_tokens=64,
    dtype="auto",
    weights=(FileDigest("model.safetensors", 5, bytes(32)),),
    bundle=(FileDigest("config.json", 6, bytes(32)),),
    layer_num_parameters=(100, 100, 100),
    embedding_num_parameters=80,
    head_num_parameters=88,
    num_kv_values_per_token_per_layer=16,
    eos_token_ids=(2,),
)
PACKED = replace(MANIFEST, packed=PackedSizes("int4", (63, 64, 65), 50, 60))
GOLDEN = Path(__file__).parent / "golden" / "manifests_v1_v2.hex"


def tiny_bundle(source: Path, directory: Path) -> ModelFacts:
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return ModelFacts("llama", 1, 8, 10, 64, 16, (2,))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with one layer of one parameter: enough to be packaged."""
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.weight", "model.norm.weight")
    header = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * n, 8 * n + 8]}
        for n, name in enumerate(names)
    }
    raw = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(24))
    return directory


@pytest.fixture
def package(source: Path, tmp_path: Path) -> ModelPackage:
    return build_package(str(source), "auto", tmp_path / "models", make_bundle=tiny_bundle)


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        ("nonsense", "unknown model 'nonsense'.*smollm2-135m"),
        ("/no/such/dir", "no file or directory /no/such/dir"),
        ("missing.gguf", "no file or directory missing.gguf"),
        ("a/b/c", "unknown model 'a/b/c'"),
    ],
)
def test_a_reference_to_nothing_says_so(ref: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        resolve(ref)
    assert "\n" not in str(caught.value)


def test_a_directory_must_be_whole(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"lacks model\.safetensors"):
        resolve(str(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(ModelError, match=r"lacks b\.safetensors \(1 weight files are missing\)"):
        resolve(str(tmp_path))
    index.write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))
    with pytest.raises(ModelError, match="names files outside its directory"):
        resolve(str(tmp_path))


def test_an_unsupported_architecture_is_named_with_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ModelError, match="'mamba' is not supported") as caught:
        make_bundle_here(tmp_path, tmp_path)
    assert all(name in str(caught.value) for name in SUPPORTED_MODEL_TYPES)


def test_stages_count_embedding_first_and_head_last() -> None:
    assert MANIFEST.stage_num_parameters(0, 1) == 180
    assert MANIFEST.stage_num_parameters(1, 2) == 100
    assert MANIFEST.stage_num_parameters(1, 3) == 288
    assert MANIFEST.stage_num_parameters(0, 3) == 468
    assert MANIFEST.stage_bytes(0, 3) == 2 * 468
    assert replace(MANIFEST, dtype="float32").stage_bytes(0, 3) == 4 * 468


def test_packed_stages_are_planned_with_what_they_weigh() -> None:
    assert PACKED.stage_bytes(0, 1) == 50 + 63
    assert PACKED.stage_bytes(1, 3) == 64 + 65 + 60
    assert PACKED.stage_num_parameters(1, 3) == 288
    assert PACKED.kv_bytes_per_token_per_layer == 2 * 16
    assert (MANIFEST.weight_type, PACKED.weight_type) == ("auto", "int4")


def test_golden_manifests_of_versions_1_and_2() -> None:
    """Models of floats keep the bytes, and so the id, that version 1 gave them."""
    golden = [bytes.fromhex(line) for line in GOLDEN.read_text().split()]
    assert [MANIFEST.encode(), PACKED.encode()] == golden
    assert [Manifest.decode(raw) for raw in golden] == [MANIFEST, PACKED]


def test_sizes_that_do_not_fit_the_layers_are_refused() -> None:
    fields = cbor2.loads(PACKED.encode())
    for sizes in (
        ["int4", [63, 64], 50, 60],
        ["int4", [63, 64, 0], 50, 60],
        ["int3", [63, 64, 65], 50, 60],
        ["int4", [63, 64, 65], -1, 60],
        ["int4", [63, 64, 65], 50],
        None,
    ):
        with pytest.raises(ModelError):
            Manifest.decode(cbor2.dumps(fields | {14: sizes}, canonical=True))


def test_a_manifest_is_read_back_only_from_its_own_bytes() -> None:
    raw = MANIFEST.encode()
    assert Manifest.decode(raw) == MANIFEST
    assert Manifest.decode(raw).model_id == MANIFEST.model_id
    fields = cbor2.loads(raw)
    changes: list[dict[int, object]] = [
        {0: 2},
        {1: ""},
        {3: 0},
        {4: -1},
        {5: 2**70},
        {6: "int3"},
        {7: [["../x", 1, bytes(32)]]},
        {7: [["x", 1, bytes(31)]]},
        {9: []},
        {9: [True]},
        {13: None},
        {14: 1},
    ]
    for change in changes:
        with pytest.raises(ModelError):
            Manifest.decode(cbor2.dumps(fields | change, canonical=True))
    with pytest.raises(ModelError, match="canonical"):
        Manifest.decode(cbor2.dumps(dict(reversed(fields.items()))))
    with pytest.raises(ModelError, match="longer"):
        Manifest.decode(bytes(2 << 20))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | st.integers(0, 200).flatmap(lambda n: st.just(MANIFEST.encode()[:n])))
def test_any_bytes_are_a_manifest_or_an_error(raw: bytes) -> None:
    with contextlib.suppress(ModelError):
        assert Manifest.decode(raw).encode() == raw


def test_a_package_has_one_id_wherever_it_is_made(
    package: ModelPackage, source: Path, tmp_path: Path
) -> None:
    again = build_package(str(source), "auto", tmp_path / "elsewhere", make_bundle=tiny_bundle)
    assert again.manifest.model_id == package.manifest.model_id
    other = build_package(str(source), "float32", tmp_path / "models", make_bundle=tiny_bundle)
    assert other.manifest.model_id != package.manifest.model_id
    assert load_package(package.manifest.model_id, tmp_path / "models") == package.manifest
    assert package.manifest.layer_num_parameters == (2,)
    assert package.manifest.head_num_parameters == 4


def test_weights_are_used_only_when_they_are_the_pods(
    package: ModelPackage, source: Path, tmp_path: Path
) -> None:
    manifest, models_dir = package.manifest, tmp_path / "models"
    assert ensure_weights(manifest, str(source), models_dir) == package.weights
    path = source / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ModelError, match="its sha256 is not the pod's"):
        ensure_weights(manifest, str(source), models_dir)
    path.write_bytes(raw[:-4])
    with pytest.raises(ModelError, match=f"{len(raw) - 4} bytes, the pod's file has {len(raw)}"):
        ensure_weights(manifest, str(source), models_dir)


def test_a_bundle_travels_whole_or_not_at_all(package: ModelPackage, tmp_path: Path) -> None:
    contents = read_bundle(package.manifest, tmp_path / "models")
    arrived = tmp_path / "arrived"
    with pytest.raises(ModelError, match=r"config\.json of source arrived damaged"):
        write_bundle(package.manifest, {name: raw + b"!" for name, raw in contents.items()}, arrived)
    assert list(arrived.iterdir()) == []
    directory = write_bundle(package.manifest, contents, arrived)
    assert directory == package_dir(package.manifest.model_id, arrived)
    assert load_package(package.manifest.model_id, arrived) == package.manifest
    assert write_bundle(package.manifest, contents, arrived) == directory


def test_a_failed_build_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def fail(*_: Path) -> ModelFacts:
        raise ModelError("no")

    with pytest.raises(ModelError):
        build_package(str(source), "auto", tmp_path / "models", make_bundle=fail)
    assert list((tmp_path / "models").iterdir()) == []


def test_chat_template_and_text_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    bundle = tmp_path / "bundle"
    bundle.mkdir()
    facts = make_bundle_here(resolve("smollm2-135m").source, bundle)
    ours = ChatTokenizer(bundle, facts.eos_token_ids)
    theirs = AutoTokenizer.from_pretrained(bundle)
    chats = [
        [{"role": "user", "content": "What is the capital of France?"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße, 世界 🙂"}],
    ]
    for chat in chats:
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert ours.apply_chat_template(chat) == expected
    ids = ours.encode("Hello there, 世界!")
    assert ids == theirs("Hello there, 世界!")["input_ids"]
    assert ours.decode(ids) == "Hello there, 世界!"
    assert ours.eos_token_ids == (2,)
    assert ours.decode([2, *ids]) == "Hello there, 世界!"
    assert ours.decode([2], skip_special=False) == "<|im_end|>"


def test_a_bundle_without_tokenizer_or_template_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        ChatTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="is damaged"):
        ChatTokenizer(tmp_path)
