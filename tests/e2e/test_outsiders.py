"""Who is not in the roster gets nothing on any plane; who is removed is cut off."""

from __future__ import annotations

import socket
import ssl
import time

import httpx
import pytest

from node.local_pod import LocalNode
from pod.identity import KeyPair, certificate_pem, key_pem
from tests.e2e.conftest import MODEL, LocalPod, wait_until

pytestmark = pytest.mark.processes


def _data_address(node: LocalNode) -> tuple[str, int]:
    status = node.pod("status")
    row = next(row for row in status["nodes"] if row["id"] == status["node"]["id"])
    host, _, port = row["data_address"].rpartition(":")
    return host, int(port)


def _handshake_refused(address: tuple[str, int], certificate: bytes, key: bytes, directory: object) -> bool:
    """Dial a stage link with that identity; True when the node ends it without a byte of its own."""
    from pathlib import Path

    path = Path(str(directory)) / "outsider.pem"
    path.write_bytes(certificate + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(path)
    with socket.create_connection(address, timeout=5) as plain:
        try:
            with context.wrap_socket(plain) as link:
                link.settimeout(5)
                return link.recv(1) == b""
        except (ssl.SSLError, ConnectionError):
            return True


def test_an_outsider_is_refused_on_the_stage_link(pod: LocalPod, tmp_path: object) -> None:
    outsider = KeyPair.create()
    for node in pod.nodes:
        address = _data_address(node)
        assert _handshake_refused(address, certificate_pem(outsider), key_pem(outsider), tmp_path)


def test_a_removed_node_is_cut_off_within_two_seconds(mortal_pod: LocalPod) -> None:
    for index in range(3):
        mortal_pod.wait_ready(index, 1)
    removed = mortal_pod.nodes[2]
    key = removed.pod("key", "create")["key"]
    began_s = time.monotonic()
    mortal_pod.nodes[0].pod("members", "remove", removed.member)

    def is_cut_off() -> bool:
        views = [node.pod("status") for node in mortal_pod.nodes[:2]]
        return all(removed.member not in {row["member"] for row in view["nodes"]} for view in views)

    wait_until("the removed member gone everywhere", is_cut_off, 5)
    for node in mortal_pod.nodes[:2]:
        answer = httpx.get(f"{node.api_url}/v1/models", headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 401
    assert removed.process is not None
    code = removed.process.wait(10)
    assert code != 0
    assert time.monotonic() - began_s < 15
    assert MODEL in {card.id for card in mortal_pod.client(1).models.list()}
