"""A gateway over HTTPS with a certificate of an authority made for the tests, and clients that trust it."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from node.tls.certificates import CertifiedKey, make_authority, new_key, request_of, sign_server
from node.tls.shown import server_context
from tests.gateway.conftest import RunningGateway, run_gateway
from tests.gateway.fake_backend import FakeBackend

NAMES = ["127.0.0.1", "localhost", "gw1.lan"]


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def certified(authority: CertifiedKey, names: list[str]) -> CertifiedKey:
    key = new_key()
    return CertifiedKey(key, (sign_server(authority, request_of(key, names), "team", now_ms()),))


@dataclass
class Https:
    """`ca_file` is what `pod ca` prints; `context` is the gateway's, `trust` a client's."""

    authority: CertifiedKey
    ca_file: Path
    context: ssl.SSLContext
    gateway: RunningGateway

    @property
    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.ca_file))


@pytest.fixture
def https(tmp_path: Path) -> Iterator[Https]:
    authority = make_authority(bytes(32), "team", now_ms())
    ca_file, file, context = tmp_path / "pod-ca.pem", tmp_path / "https.pem", server_context()
    ca_file.write_bytes(authority.certificate.public_bytes(Encoding.PEM))
    certified(authority, NAMES).save(file)
    context.load_cert_chain(file)
    for gateway in run_gateway(FakeBackend(), tls=context):
        yield Https(authority, ca_file, context, gateway)
