"""The gateway over HTTPS on real sockets: official clients, cookies, strictness, stalls, renewal."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import APIConnectionError, DefaultHttpxClient, OpenAI

from node.dashboard.routes import COOKIE
from node.gateway import request_context, serve
from tests.gateway.conftest import run_gateway
from tests.gateway.fake_backend import KEY, FakeBackend
from tests.tls.conftest import Https, certified

QUICKLY_S = 5.0


def openai_client(https: Https, host: str, trust: ssl.SSLContext) -> OpenAI:
    return OpenAI(
        base_url=f"https://{host}:{https.gateway.port}/v1",
        api_key=KEY,
        max_retries=0,
        timeout=QUICKLY_S,
        http_client=DefaultHttpxClient(verify=trust, trust_env=False),
    )


def test_the_openai_client_streams_when_it_trusts_the_authority(https: Https) -> None:
    for host in ("localhost", "127.0.0.1"):
        with openai_client(https, host, https.trust).chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], stream=True
        ) as stream:
            text = "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)
        assert text


def test_no_client_talks_to_it_without_the_authority_or_by_another_name(https: Https) -> None:
    strangers = openai_client(https, "localhost", ssl.create_default_context())
    with pytest.raises(APIConnectionError) as refused:
        strangers.models.list()
    assert "CERTIFICATE_VERIFY_FAILED" in repr(refused.value.__cause__)
    with httpx.Client(verify=https.trust, timeout=QUICKLY_S) as client:
        sni = {"sni_hostname": "gw2.lan"}
        with pytest.raises(httpx.ConnectError, match="Hostname mismatch"):
            client.get(f"{https.gateway.url}/healthz", extensions=sni)
        sni = {"sni_hostname": "gw1.lan"}
        assert client.get(f"{https.gateway.url}/healthz", extensions=sni).text == "ok\n"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl_logs_in_and_sees_the_dashboard(https: Https, tmp_path: Path) -> None:
    cookies = str(tmp_path / "cookies")

    def curl(*arguments: str) -> subprocess.CompletedProcess[str]:
        host = f"gw1.lan:{https.gateway.port}"
        reach = ["--cacert", str(https.ca_file), "--connect-to", f"{host}:127.0.0.1:{https.gateway.port}"]
        command = ["curl", "-sS", "--noproxy", "*", "-b", cookies, "-c", cookies, *reach, *arguments]
        return subprocess.run(
            [argument.replace("POD", f"https://{host}") for argument in command],
            capture_output=True,
            text=True,
            timeout=20,
        )

    assert curl("-o", "/dev/null", "-w", "%{http_code} %{redirect_url}", "POD/").stdout.endswith("/login")
    said = curl("-i", "--data-urlencode", f"key={KEY}", "POD/login").stdout.lower()
    cookie = next(line for line in said.splitlines() if line.startswith("set-cookie:"))
    assert COOKIE in cookie
    for attribute in ("secure", "httponly", "samesite=strict"):
        assert attribute in cookie
    assert "team-pod" in curl("POD/").stdout
    elsewhere = curl("-H", "origin: https://evil.example", "-d", "", "POD/logout", "-w", "%{http_code}")
    assert elsewhere.stdout.endswith("403")
    downgraded = curl("-H", f"origin: http://gw1.lan:{https.gateway.port}", "-d", "", "POD/logout")
    assert "another site" in downgraded.stdout
    fetched = curl("-H", "sec-fetch-site: cross-site", "-d", "", "POD/logout", "-w", "%{http_code}")
    assert fetched.stdout.endswith("403")


def test_browsers_are_told_to_be_strict_only_where_that_is_right(
    https: Https, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds for every port of a host: for one with a certificate of its own on the HTTPS port alone."""
    strict = "strict-transport-security"

    def headers_of(port: int) -> httpx.Headers:
        return httpx.get(f"https://localhost:{port}/login", verify=https.trust, trust_env=False).headers

    assert strict not in headers_of(https.gateway.port)
    for gateway in run_gateway(FakeBackend(), tls=https.context, is_strict=True):
        assert strict not in headers_of(gateway.port)
        monkeypatch.setattr(request_context, "HTTPS_PORT", gateway.port)
        assert headers_of(gateway.port)[strict] == "max-age=31536000"
    for gateway in run_gateway(FakeBackend(), is_strict=True):
        monkeypatch.setattr(request_context, "HTTPS_PORT", gateway.port)
        assert strict not in httpx.get(f"{gateway.url}/login", trust_env=False).headers


def test_a_newer_certificate_is_shown_without_a_restart(https: Https, tmp_path: Path) -> None:
    def fingerprint() -> bytes | None:
        with (
            socket.create_connection(("127.0.0.1", https.gateway.port), QUICKLY_S) as sock,
            https.trust.wrap_socket(sock, server_hostname="localhost") as shaken,
        ):
            return shaken.getpeercert(binary_form=True)

    with httpx.Client(base_url=https.gateway.url, verify=https.trust, timeout=QUICKLY_S) as open_before:
        assert open_before.get("/healthz").status_code == 200
        first = fingerprint()
        certified(https.authority, ["127.0.0.1", "localhost"]).save(tmp_path / "newer.pem")
        https.context.load_cert_chain(tmp_path / "newer.pem")
        assert fingerprint() != first
        assert open_before.get("/healthz").status_code == 200


@pytest.fixture
def hasty(https: Https, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(serve, "HANDSHAKE_TIMEOUT_S", 0.5)
    for gateway in run_gateway(FakeBackend(), tls=https.context):
        yield gateway.port


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n"])
def test_a_handshake_that_does_not_happen_ends(hasty: int, said: bytes) -> None:
    began_s = time.monotonic()
    with socket.create_connection(("127.0.0.1", hasty), QUICKLY_S) as sock:
        sock.sendall(said)
        try:
            while sock.recv(1024):
                pass
        except ConnectionResetError:
            pass
    assert time.monotonic() - began_s < QUICKLY_S
