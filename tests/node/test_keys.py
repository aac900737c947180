"""`pod key` on a state directory: what may be asked of a key, what is kept of it, how it is revoked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from node.errors import UserError
from node.home import PodHome
from node.office import Office, create_pod, open_offline, wall_clock_ms
from node.operations import run_operation
from pod.api_key import ApiKeyError, ApiKeyReason, parse_bearer, verify
from pod.roster.events import ModelDeployed
from tests.node.session_world import MANIFEST

SMALL, LARGE = "small", "org/large"


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    """A pod of one machine, whose node does not run, with two models."""
    home = PodHome(tmp_path / "home")
    create_pod(home, "alpha", "olga", "desk")
    home.acquire()
    with closing(open_offline(home)) as opened:
        for name in (SMALL, LARGE):
            body = ModelDeployed(name, "ref", MANIFEST.model_id, MANIFEST.encode(), 0, "auto")
            opened.membership.issue(body)
        yield opened
    home.release()


def perform(office: Office, operation: str, **arguments: object) -> Any:
    return asyncio.run(run_operation(office, operation, arguments, lambda _: None))


def create(office: Office, **arguments: object) -> Any:
    return perform(office, "key_create", **{"name": "laptop", **arguments})


def test_a_key_says_what_it_is_limited_to_and_so_does_the_list(office: Office) -> None:
    made = create(office, cap="5", models=f"{SMALL}, {LARGE}", rpm="30", tpm="20000", expires_s=60)
    _, delegation = parse_bearer(made["key"])
    verify(delegation, office.membership.roster, wall_clock_ms())
    assert (delegation.cap_microcredits, delegation.models) == (5_000_000, (SMALL, LARGE))
    assert delegation.max_num_requests_per_minute == 30
    assert delegation.max_num_tokens_per_minute == 20_000
    (row,) = perform(office, "key_list")["keys"]
    assert delegation.key_id.hex().startswith(row["key_id"])
    said = {name: row[name] for name in ("name", "models", "cap_microcredits", "rpm", "tpm", "state")}
    assert said == {
        "name": "laptop",
        "models": [SMALL, LARGE],
        "cap_microcredits": 5_000_000,
        "rpm": 30,
        "tpm": 20_000,
        "state": "valid",
    }
    assert row["spent_microcredits"] == 0
    assert row["expires_ms"] == delegation.expires_ms


def test_nothing_that_opens_anything_is_kept(office: Office, tmp_path: Path) -> None:
    made = create(office, cap="5")
    key, _ = parse_bearer(made["key"])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "roster.log" for path in files)
    for path in files:
        content = path.read_bytes()
        assert key.seed not in content, path
        assert made["key"].encode() not in content, path


@pytest.mark.parametrize("name", ["cap", "rpm", "tpm"])
@pytest.mark.parametrize(
    "value", ["0", "-1", "1.5", "1e3", "", "lots", "½", "٣", "9" * 30, "10000000000", True]
)
def test_a_limit_is_a_whole_number_above_zero(office: Office, name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"--{name} must be from 1 to") as refused:
        create(office, **{name: value})
    assert "\n" not in str(refused.value)
    assert perform(office, "key_list")["keys"] == []


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ("gpt-9", "no model 'gpt-9'; it has: org/large, small"),
        (f"{SMALL},gpt-9", "no model 'gpt-9'"),
        ("", "no model ''"),
        (f"{SMALL},", "no model ''"),
    ],
)
def test_models_that_do_not_exist_are_refused(office: Office, models: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        create(office, models=models)
    assert perform(office, "key_list")["keys"] == []


def test_a_key_fits_into_the_proof_that_other_members_nodes_need(office: Office) -> None:
    names = [f"{number}-{'m' * 150}" for number in range(9)]
    for name in names:
        body = ModelDeployed(name, "ref", MANIFEST.model_id, MANIFEST.encode(), 0, "auto")
        office.membership.issue(body)
    with pytest.raises(UserError, match="8 are the most"):
        create(office, models=",".join(names))
    with pytest.raises(UserError, match="too much for one key"):
        create(office, models=",".join(names[:8]))
    assert create(office, models=",".join(names[:3]))["models"] == names[:3]


@pytest.mark.parametrize("how", ["name", "id", "the key itself"])
def test_a_key_is_revoked_by_name_id_or_itself(office: Office, how: str) -> None:
    made = create(office, name="one")
    create(office, name="other")
    _, delegation = parse_bearer(made["key"])
    wanted = {"name": "one", "id": made["key_id"], "the key itself": made["key"]}[how]
    assert perform(office, "key_revoke", key=wanted)["key_id"] == made["key_id"]
    with pytest.raises(ApiKeyError) as refused:
        verify(delegation, office.membership.roster, wall_clock_ms())
    assert refused.value.reason is ApiKeyReason.REVOKED
    states = {row["name"]: row["state"] for row in perform(office, "key_list")["keys"]}
    assert states == {"one": "revoked", "other": "valid"}


def test_what_names_no_key_is_one_line_that_repeats_no_key(office: Office) -> None:
    first, second = create(office), create(office)
    with pytest.raises(UserError, match="2 keys called laptop"):
        perform(office, "key_revoke", key="laptop")
    with pytest.raises(UserError, match="no key called nothing"):
        perform(office, "key_revoke", key="nothing")
    perform(office, "key_revoke", key=first["key"])
    for gone in (first["key"], second["key"][:-3], "sk-pod-nonsense"):
        with pytest.raises(UserError) as refused:
            perform(office, "key_revoke", key=gone)
        assert "\n" not in str(refused.value)
        assert gone[10:30] not in str(refused.value)
