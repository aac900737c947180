"""HTTPS of real nodes: one authority for the pod, at every node, also while the owner's machine is off."""

from __future__ import annotations

import hashlib
import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIConnectionError, DefaultHttpxClient, OpenAI

from node.local_pod import LocalNode
from tests.e2e.conftest import wait_until

pytestmark = pytest.mark.processes

EVERYWHERE = ("--api", "0.0.0.0:0", "--no-serve")


def https_of(node: LocalNode) -> Any:
    return node.pod("status")["node"]["https"]


def has_the_pods(node: LocalNode) -> bool:
    return bool(https_of(node)["source"] == "pod")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[LocalNode]]:
    directory = tmp_path_factory.mktemp("https")
    made = [LocalNode(name, directory / name) for name in ("olga", "anna", "ben")]
    olga, anna, ben = made
    for node in made:
        node.home.mkdir(mode=0o700)
    try:
        olga.pod("create", "testpod", "--member", "olga", "--node-name", "olga")
        olga.start("up", *EVERYWHERE)
        olga.wait_until_up()
        for node, role in ((anna, "admin"), (ben, "member")):
            invite = olga.pod("invite", "--role", role)["invite"]
            node.start("join", invite, "--member", node.member, "--node-name", node.member, *EVERYWHERE)
            node.wait_until_up()
        yield made
    finally:
        for node in made:
            node.stop()


def test_every_node_has_a_certificate_under_the_one_authority(nodes: list[LocalNode], tmp_path: Path) -> None:
    for node in nodes:
        wait_until(f"{node.member} has a certificate", lambda node=node: has_the_pods(node), 60)
    exported = [node.pod("ca") for node in nodes]
    assert exported[0] == exported[1] == exported[2]
    assert nodes[2].pod("status")["pod"]["authority_sha256"] == exported[0]["fingerprint_sha256"]
    ca_file = tmp_path / "pod-ca.pem"
    ca_file.write_text(exported[0]["pem"])
    trust = ssl.create_default_context(cafile=str(ca_file))
    key = nodes[0].pod("key", "create", "--name", "tests")["key"]
    for node in nodes:
        assert node.api_url.startswith("https://")
        shown = ssl.get_server_certificate(_address(node.api_url), ca_certs=str(ca_file))
        digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(shown)).hexdigest()
        assert https_of(node)["fingerprint_sha256"].replace(":", "").lower() == digest
        for verify, is_trusted in ((trust, True), (ssl.create_default_context(), False)):
            http = DefaultHttpxClient(verify=verify, trust_env=False)
            client = OpenAI(base_url=f"{node.api_url}/v1", api_key=key, max_retries=0, http_client=http)
            if is_trusted:
                assert client.models.list().data == []
            else:
                with pytest.raises(APIConnectionError):
                    client.models.list()
        # From elsewhere, by its address, the dashboard wants a login; and this machine's command needs none.
        assert httpx.get(node.api_url, verify=trust, trust_env=False).headers["location"] == "/login"
        assert node.pod("members")["members"]
    assert (nodes[0].home / "keys" / "authority.pem").exists()
    assert not any((node.home / "keys" / "authority.pem").exists() for node in nodes[1:])


def test_a_node_that_comes_while_the_owner_is_away_gets_its_certificate_from_an_admins(
    nodes: list[LocalNode], tmp_path: Path
) -> None:
    olga, anna, _ = nodes
    wait_until("anna may sign", lambda: (anna.home / "keys" / "issuer.pem").exists(), 60)
    invite = anna.pod("invite")["invite"]
    olga.stop()
    dora = LocalNode("dora", tmp_path / "dora")
    dora.home.mkdir(mode=0o700)
    try:
        dora.start("join", invite, "--member", "dora", "--node-name", "dora", *EVERYWHERE)
        dora.wait_until_up()
        wait_until("dora has a certificate", lambda: has_the_pods(dora), 60)
        trust = ssl.create_default_context(cadata=dora.pod("ca")["pem"])
        assert httpx.get(f"{dora.api_url}/healthz", verify=trust, trust_env=False).text == "ok\n"
    finally:
        dora.stop()
        olga.start("up", *EVERYWHERE)
        olga.wait_until_up()


def test_plain_http_elsewhere_only_when_asked_for_and_bad_files_in_one_line(
    nodes: list[LocalNode], tmp_path: Path
) -> None:
    ben = nodes[2]
    ben.stop()
    for options, reason in (
        (("--tls-cert", str(tmp_path / "none.pem")), "cannot read"),
        (("--tls-key", "k.pem"), "--tls-key needs --tls-cert"),
        (("--tls-cert", "c.pem", "--insecure-http"), "exclude each other"),
    ):
        command = [sys.executable, "-m", "node", "up", "--listen", "127.0.0.1:0", *EVERYWHERE, *options]
        done = subprocess.run(command, env=ben.environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert reason in done.stderr
    ben.start("up", *EVERYWHERE, "--insecure-http")
    ben.wait_until_up()
    assert ben.api_url.startswith("http://")
    assert httpx.get(f"{ben.api_url}/healthz", trust_env=False).text == "ok\n"
    assert https_of(ben) is None
    assert "plain HTTP" in (ben.home.parent / "ben.log").read_text()
    ben.stop()
    ben.start("up", "--no-serve")
    ben.wait_until_up()
    assert ben.api_url.startswith("http://127.0.0.1:")
    note = json.loads((ben.home / "running.json").read_text())
    assert note["local_url"] == note["api_url"]


def _address(url: str) -> tuple[str, int]:
    parsed = httpx.URL(url)
    assert parsed.port is not None
    return parsed.host, parsed.port
