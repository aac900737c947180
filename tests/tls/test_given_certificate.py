"""`--tls-cert` and `--tls-key`: what is taken, what is refused in one line, and files that change."""

from __future__ import annotations

import asyncio
import datetime
import os
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

from node.cli.options import node_settings
from node.errors import UserError
from node.tls.given_certificate import MAX_FILE_BYTES, GivenCertificate
from tests.tls.conftest import now_ms

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def new_key() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


def write_key(file: Path, key: Key, encryption: KeySerializationEncryption | None = None) -> Path:
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption()))
    return file


def write_certificate(file: Path, key: Key, from_days: int = -1, to_days: int = 30) -> Path:
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "gpu.example.com")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=from_days))
        .not_valid_after(now + datetime.timedelta(days=to_days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("gpu.example.com")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file.write_bytes(made.public_bytes(Encoding.PEM))
    return file


def refusal(certificate_file: Path, key_file: Path) -> str:
    with pytest.raises(UserError) as refused:
        GivenCertificate(certificate_file, key_file, now_ms).start()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_two_files_or_one(tmp_path: Path) -> None:
    for key in (new_key(), rsa.generate_private_key(65537, 2048)):
        certificate = write_certificate(tmp_path / "cert.pem", key)
        key_file = write_key(tmp_path / "key.pem", key)
        given = GivenCertificate(certificate, key_file, now_ms)
        given.start()
        assert given.shown is not None
        assert given.shown.as_json()["names"] == ["gpu.example.com"]
        both = tmp_path / "both.pem"
        both.write_bytes(key_file.read_bytes() + certificate.read_bytes())
        GivenCertificate(both, both, now_ms).start()


def test_what_is_refused_says_which_file_and_why(tmp_path: Path) -> None:
    key = new_key()
    certificate, key_file = write_certificate(tmp_path / "c.pem", key), write_key(tmp_path / "k.pem", key)
    junk, other = tmp_path / "junk.pem", write_key(tmp_path / "other.pem", new_key())
    junk.write_bytes(b"\xff" * 100)
    missing = tmp_path / "missing.pem"
    assert "cannot read" in refusal(missing, key_file)
    assert "No such file" in refusal(missing, key_file)
    assert "--tls-key" in refusal(certificate, missing)
    assert "Is a directory" in refusal(tmp_path, key_file)
    assert "no certificate in PEM form" in refusal(junk, key_file)
    assert "no certificate in PEM form" in refusal(key_file, key_file)
    assert "no private key in PEM form" in refusal(certificate, junk)
    assert "no private key in PEM form" in refusal(certificate, certificate)
    assert "does not belong to" in refusal(certificate, other)
    locked = write_key(tmp_path / "locked.pem", key, BestAvailableEncryption(b"secret"))
    assert "is encrypted" in refusal(certificate, locked)
    junk.write_bytes(b"x" * (MAX_FILE_BYTES + 1))
    assert "too large" in refusal(junk, key_file)
    assert "expired on" in refusal(write_certificate(tmp_path / "old.pem", key, -30, -1), key_file)
    assert "good from" in refusal(write_certificate(tmp_path / "new.pem", key, 2), key_file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_one_may_not_read(tmp_path: Path) -> None:
    key = new_key()
    certificate, key_file = write_certificate(tmp_path / "c.pem", key), write_key(tmp_path / "k.pem", key)
    key_file.chmod(0)
    assert "Permission denied" in refusal(certificate, key_file)


def test_files_that_change_are_read_again_and_bad_ones_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = new_key()
    certificate, key_file = write_certificate(tmp_path / "c.pem", key), write_key(tmp_path / "k.pem", key)
    given = GivenCertificate(certificate, key_file, now_ms)
    given.start()
    assert given.shown is not None
    first = given.shown.certificate
    write_certificate(certificate, new_key())
    os.utime(certificate, (1, 1))
    asyncio.run(given.refresh())
    assert given.shown.certificate == first
    assert "does not belong" in caplog.text
    write_certificate(certificate, key, to_days=60)
    os.utime(certificate, (2, 2))
    asyncio.run(given.refresh())
    assert given.shown.certificate != first


def test_options_that_do_not_go_together() -> None:
    addresses = ("127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0", None, "auto", None, True)
    with pytest.raises(UserError, match="--tls-key needs --tls-cert"):
        node_settings(*addresses, tls_key=Path("k.pem"))
    with pytest.raises(UserError, match="exclude each other"):
        node_settings(*addresses, tls_cert=Path("c.pem"), insecure_http=True)
    settings = node_settings(*addresses, tls_cert=Path("c.pem"))
    assert settings.tls_key == Path("c.pem")
