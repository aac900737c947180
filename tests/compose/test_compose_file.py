"""docker-compose.yml, Dockerfile and entry script agree, and keep their promises without a Docker engine.

The schema here is narrower than the official one: it allows only the keys that are used, so that a misspelt
key fails.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
ENTRY = ROOT / "docker" / "entry.sh"

TEXT = {"type": "string"}
DURATION = {"type": "string", "pattern": "^[0-9]+(s|m)$"}
SERVICE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["image", "build", "environment", "ports", "volumes", "healthcheck", "restart"],
    "properties": {
        "image": TEXT,
        "build": {
            "type": "object",
            "additionalProperties": False,
            "required": ["context"],
            "properties": {"context": TEXT, "args": {"type": "object", "additionalProperties": TEXT}},
        },
        "init": {"const": True},
        "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]},
        "stop_grace_period": DURATION,
        "read_only": {"type": "boolean"},
        "tmpfs": {"type": "array", "items": TEXT},
        "cap_drop": {"type": "array", "items": TEXT, "uniqueItems": True},
        "security_opt": {"type": "array", "items": TEXT, "uniqueItems": True},
        "environment": {"type": "object", "additionalProperties": TEXT},
        "ports": {"type": "array", "items": TEXT, "uniqueItems": True},
        "volumes": {"type": "array", "items": TEXT, "uniqueItems": True},
        "depends_on": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "required": ["condition"],
                "properties": {"condition": {"enum": ["service_healthy"]}},
            },
        },
        "healthcheck": {
            "type": "object",
            "additionalProperties": False,
            "required": ["test", "interval", "timeout", "retries", "start_period"],
            "properties": {
                "test": {"type": "array", "items": TEXT},
                "interval": DURATION,
                "timeout": DURATION,
                "retries": {"type": "integer"},
                "start_period": DURATION,
            },
        },
    },
}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["services", "volumes"],
    "patternProperties": {"^x-": {}},
    "properties": {
        "name": TEXT,
        "services": {"type": "object", "additionalProperties": SERVICE, "minProperties": 3},
        "volumes": {"type": "object", "additionalProperties": {"type": "null"}},
    },
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return loaded


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


def defaults(text: str) -> str:
    """The text as Compose reads it when no variable is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def test_the_file_has_the_shape_of_a_compose_file(compose: dict[str, Any]) -> None:
    jsonschema.validate(compose, SCHEMA)


def test_every_variable_has_a_default() -> None:
    text = COMPOSE.read_text()
    assert "$" not in re.sub(r"\$\{[A-Z][A-Z0-9_]*:-[^}$]*\}", "", text)


def test_three_members_one_of_whom_creates(compose: dict[str, Any]) -> None:
    settings = [service["environment"] for service in compose["services"].values()]
    assert len({row["POD_MEMBER"] for row in settings}) == 3
    assert len([row for row in settings if "POD_NAME" in row]) == 1
    assert all(("POD_NAME" in row) != ("POD_INVITE_FILE" in row) for row in settings)
    assert all(row["POD_ADVERTISE"] == name for name, row in zip(compose["services"], settings, strict=True))


def test_ports_are_published_on_loopback_only(compose: dict[str, Any]) -> None:
    published = [defaults(port) for service in compose["services"].values() for port in service["ports"]]
    assert len(set(published)) == 3
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:8420", port) for port in published)


def test_no_secret_stands_in_the_files(compose: dict[str, Any], dockerfile: str) -> None:
    for text in (COMPOSE.read_text(), dockerfile, ENTRY.read_text()):
        assert not re.search(r"pod-invite-\w|sk-pod-", text)
    assert all("POD_INVITE" not in service["environment"] for service in compose["services"].values())


def test_each_joiner_shares_a_volume_with_the_creator_alone(compose: dict[str, Any]) -> None:
    services = compose["services"]
    creator = next(name for name, service in services.items() if "POD_NAME" in service["environment"])
    written = services[creator]["environment"]["POD_INVITE_FILES"].split()
    for name, service in services.items():
        if name == creator:
            continue
        read = Path(service["environment"]["POD_INVITE_FILE"])
        assert str(read) in written
        (volume,) = [text.split(":")[0] for text in service["volumes"] if f":{read.parent}" in text]
        assert f"{volume}:{read.parent}:ro" in service["volumes"], "a joiner only reads"
        mounted = {n: [text.split(":")[0] for text in s["volumes"]] for n, s in services.items()}
        owners = [owner for owner, volumes in mounted.items() if volume in volumes]
        assert sorted(owners) == sorted([creator, name])
        assert service["depends_on"] == {creator: {"condition": "service_healthy"}}


def test_volumes_are_declared_used_and_made_for_the_node_user(
    compose: dict[str, Any], dockerfile: str
) -> None:
    mounts = [text.split(":") for service in compose["services"].values() for text in service["volumes"]]
    assert {mount[0] for mount in mounts} == set(compose["volumes"])
    made = re.search(r"install --directory --owner=pod --group=pod --mode=700 \\\n(.*)", dockerfile)
    assert made is not None
    assert {mount[1] for mount in mounts} <= set(made[1].split())
    homes = [mount[0] for mount in mounts if mount[1] == "/var/lib/gpu-pod"]
    assert sorted(homes) == sorted(set(homes)), "a state directory belongs to one node"


def test_every_setting_is_one_that_somebody_reads(compose: dict[str, Any], dockerfile: str) -> None:
    commands = "".join(path.read_text() for path in (ROOT / "node").rglob("*.py"))
    given = {name for service in compose["services"].values() for name in service["environment"]}
    given |= set(re.findall(r"\b(POD_\w+)=", dockerfile))
    for name in given - {"OMP_NUM_THREADS"}:
        assert f'"{name}"' in commands or re.search(rf"\b{name}\b", ENTRY.read_text()), name


def test_the_image_does_not_run_as_root(dockerfile: str) -> None:
    steps = re.findall(r"^(FROM|USER|ENTRYPOINT|HEALTHCHECK|VOLUME)\b(.*)$", dockerfile, re.MULTILINE)
    last = {step: argument.strip() for step, argument in steps}
    assert last["USER"] == "pod"
    assert last["VOLUME"] == "/var/lib/gpu-pod"
    assert last["ENTRYPOINT"] == '["entry.sh"]'
    assert "healthy.sh" in last["HEALTHCHECK"]
    assert [step for step, _ in steps].index("USER") < [step for step, _ in steps].index("ENTRYPOINT")


def test_what_the_image_copies_exists_and_is_sent_to_the_builder(dockerfile: str) -> None:
    lines = re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE)
    sources = [source for line in lines for source in line.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source.split("/")[0], pattern) for pattern in allowed), source
    assert "*" in ignored


def test_versions_are_pinned_by_the_constraints(dockerfile: str) -> None:
    installs = re.findall(r"pip install (.+)", dockerfile)
    assert installs
    for install in installs:
        assert "--constraint constraints.txt" in install or "==" in install, install


@pytest.mark.parametrize("script", ["entry.sh", "healthy.sh"])
def test_scripts_are_posix_and_executable(script: str) -> None:
    path = ROOT / "docker" / script
    assert path.read_text().startswith("#!/bin/sh\n")
    assert os.access(path, os.X_OK)
    for shell in {"sh", "dash"}:
        if shutil.which(shell):
            subprocess.run([shell, "-n", path], check=True, timeout=10)
