"""Certificates of the pod's authority, judged by OpenSSL and by `cryptography`'s own verifier."""

from __future__ import annotations

import datetime
import socket
import ssl
import stat
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from node.tls import certificates
from node.tls.certificates import (
    DAY_MS,
    ISSUER_DAYS,
    MAX_CSR_BYTES,
    SERVER_DAYS,
    CertificateError,
    CertifiedKey,
    check_chain,
    covers,
    make_authority,
    new_key,
    read_chain,
    request_of,
    self_signed,
    sign_issuer,
    sign_server,
)
from node.tls.names import MAX_NUM_NAMES, is_signable, split_names, wanted_names

NOW_MS = time.time_ns() // 1_000_000
NAMES = ("gw1", "gw1.lan", "10.0.0.5", "fd00::5", "127.0.0.1", "localhost")


@pytest.fixture(scope="module")
def authority() -> CertifiedKey:
    return make_authority(bytes(32), "team", NOW_MS)


@pytest.fixture(scope="module")
def issuer(authority: CertifiedKey) -> CertifiedKey:
    key = new_key()
    return CertifiedKey(key, (sign_issuer(authority, request_of(key), bytes(32), "team", NOW_MS),))


def server(signer: CertifiedKey, names: Sequence[str] = NAMES) -> CertifiedKey:
    key = new_key()
    made = sign_server(signer, request_of(key, names), "team", NOW_MS)
    return CertifiedKey(
        key, (made,) if signer.certificate.issuer == signer.certificate.subject else (made, *signer.chain)
    )


def der(authority: CertifiedKey) -> bytes:
    return authority.certificate.public_bytes(Encoding.DER)


def shake_hands(shown: CertifiedKey, authority: CertifiedKey, host: str, directory: Path) -> None:
    """Raises ssl.SSLError unless a client that trusts `authority` takes `shown` as `host`'s."""
    shown.save(directory / "shown.pem")
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(directory / "shown.pem")
    client_side = ssl.create_default_context(cadata=authority.certificate.public_bytes(Encoding.PEM).decode())
    one, other = socket.socketpair()

    def serve() -> None:
        try:
            server_side.wrap_socket(one, server_side=True)
        except OSError:
            one.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client_side.wrap_socket(other, server_hostname=host)
    finally:
        other.close()
        thread.join()
        one.close()


@pytest.mark.parametrize("host", NAMES)
def test_clients_that_trust_the_authority_take_it_for_its_names(
    authority: CertifiedKey, issuer: CertifiedKey, tmp_path: Path, host: str
) -> None:
    for signer in (authority, issuer):
        shake_hands(server(signer), authority, host, tmp_path)
    if host.startswith("gw"):
        verifier = (
            PolicyBuilder().store(Store([authority.certificate])).build_server_verifier(x509.DNSName(host))
        )
        assert verifier.verify(server(issuer).certificate, list(issuer.chain))


def test_not_for_other_names_nor_for_who_trusts_another_authority(
    authority: CertifiedKey, issuer: CertifiedKey, tmp_path: Path
) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(server(issuer), authority, "gw2", tmp_path)
    other = make_authority(bytes(32), "team", NOW_MS)
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        shake_hands(server(issuer), other, "gw1", tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError, match="self-signed"):
        shake_hands(self_signed(NAMES, "team", NOW_MS), authority, "gw1", tmp_path)


@pytest.mark.parametrize("name", ["example.com", "mail.google.com", "bank.de", "pod.example.io"])
def test_whoever_trusts_the_authority_trusts_it_with_no_public_name(
    authority: CertifiedKey, issuer: CertifiedKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An honest issuer does not sign it; what a dishonest one signs, clients refuse."""
    with pytest.raises(CertificateError, match="public name"):
        server(issuer, [name])
    monkeypatch.setattr(certificates, "is_signable", lambda _: True)
    for signer in (authority, issuer):
        with pytest.raises(ssl.SSLCertVerificationError, match="excluded subtree"):
            shake_hands(server(signer, [name]), authority, name, tmp_path)
    verifier = PolicyBuilder().store(Store([authority.certificate])).build_server_verifier(x509.DNSName(name))
    with pytest.raises(VerificationError):
        verifier.verify(server(issuer, [name]).certificate, list(issuer.chain))


def test_an_issuer_makes_no_further_issuers(
    authority: CertifiedKey, issuer: CertifiedKey, tmp_path: Path
) -> None:
    key = new_key()
    further = CertifiedKey(key, (sign_issuer(issuer, request_of(key), bytes([1] * 32), "team", NOW_MS),))
    made = server(further)
    shown = CertifiedKey(made.key, (made.certificate, further.certificate, issuer.certificate))
    with pytest.raises(ssl.SSLCertVerificationError, match="path length"):
        shake_hands(shown, authority, "gw1", tmp_path)


def test_only_private_names_and_addresses_are_signed() -> None:
    for name in ("gw1", "gw1.local", "a.b.internal", "nas.home.arpa", "192.168.1.2", "203.0.113.9", "::1"):
        assert is_signable(name), name
    for name in ("com", "a.com", "vpn.example.org", "*.lan", "a b", "", "-a.lan", "x" * 64 + ".lan", "ai"):
        assert not is_signable(name), name


def test_what_clients_may_call_a_gateway() -> None:
    own = ["gw1.local", "localhost", "127.0.0.1", "::1"]
    assert wanted_names("10.0.0.5", None, "gw1", ()) == ["10.0.0.5", "gw1", *own]
    found = wanted_names("0.0.0.0", "gpu.example.com", "GW1.corp.example.com", ["10.0.0.5", "172.17.0.1"])
    assert found == ["gpu.example.com", "10.0.0.5", "172.17.0.1", "gw1", *own]
    assert split_names(found) == (found[1:], ["gpu.example.com"])
    assert wanted_names("::", None, "büro_1", ["fd00::5"]) == ["fd00::5", "localhost", "127.0.0.1", "::1"]


def test_lifetimes(authority: CertifiedKey, issuer: CertifiedKey) -> None:
    made = server(issuer)
    assert made.not_after_ms // 1000 == NOW_MS // 1000 + SERVER_DAYS * DAY_MS // 1000
    assert not made.is_past_half(NOW_MS + (SERVER_DAYS // 2 - 2) * DAY_MS)
    assert made.is_past_half(NOW_MS + SERVER_DAYS // 2 * DAY_MS)
    check_chain(made.chain, der(authority), NOW_MS)
    # Other machines' clocks may be a day behind.
    check_chain(made.chain, der(authority), NOW_MS - DAY_MS + 1000)
    with pytest.raises(CertificateError, match="expired on"):
        check_chain(made.chain, der(authority), NOW_MS + (SERVER_DAYS + 1) * DAY_MS)
    with pytest.raises(CertificateError, match="good from"):
        check_chain(made.chain, der(authority), NOW_MS - 2 * DAY_MS)
    # Nothing is good for longer than what signed it.
    key = new_key()
    late_ms = NOW_MS + (ISSUER_DAYS - 1) * DAY_MS
    late = sign_server(issuer, request_of(key, NAMES), "team", late_ms)
    assert late.not_valid_after_utc == issuer.certificate.not_valid_after_utc


def test_requests_that_are_not_signed(issuer: CertifiedKey) -> None:
    key = new_key()
    good = request_of(key, ["gw1"])
    many = [f"gw{number}" for number in range(MAX_NUM_NAMES + 1)]
    for csr, reason in (
        (b"", "not a request"),
        (good[:-1], "not a request"),
        (good.replace(b"gw1", b"gw2"), "signature"),
        (b"x" * (MAX_CSR_BYTES + 1), "too long"),
        (request_of(key), "names are signed"),
        (request_of(key, many), "names are signed"),
        (_request(ec.generate_private_key(ec.SECP384R1()), x509.DNSName("gw1")), "only P-256"),
        (_request(key, x509.RFC822Name("a@b.lan")), "not understood"),
        (_request(key, x509.DNSName("*.lan")), "public name"),
    ):
        with pytest.raises(CertificateError, match=reason):
            sign_server(issuer, csr, "team", NOW_MS)


def _request(key: ec.EllipticCurvePrivateKey, name: x509.GeneralName) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    builder = builder.add_extension(x509.SubjectAlternativeName([name]), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def test_kept_in_one_file_for_its_owner_only(issuer: CertifiedKey, tmp_path: Path) -> None:
    made, file = server(issuer), tmp_path / "keys" / "https.pem"
    made.save(file)
    made.save(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    loaded = CertifiedKey.load(file)
    assert loaded is not None
    assert loaded.chain == made.chain
    assert covers(loaded.certificate, NAMES)
    assert not covers(loaded.certificate, [*NAMES, "gw2"])
    for damaged in (b"", b"junk", file.read_bytes()[:400]):
        file.write_bytes(damaged)
        assert CertifiedKey.load(file) is None
    assert CertifiedKey.load(tmp_path / "nothing") is None


def odd_certificate(authority: CertifiedKey, name: x509.GeneralName) -> CertifiedKey:
    key = new_key()
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([name]), critical=False)
    )
    return CertifiedKey(key, (builder.sign(authority.key, hashes.SHA256()),))


def with_unknown_curve(certificate: x509.Certificate) -> bytes:
    p256, prime239 = bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a8648ce3d030106")
    return certificate.public_bytes(Encoding.DER).replace(p256, prime239)


def test_what_cannot_be_read_is_no_certificate(authority: CertifiedKey, tmp_path: Path) -> None:
    odd = odd_certificate(authority, x509.UniformResourceIdentifier("https://gw1"))
    for der in (
        odd.certificate.public_bytes(Encoding.DER),
        with_unknown_curve(server(authority).certificate),
        b"mine",
    ):
        with pytest.raises(CertificateError, match="not a certificate"):
            read_chain([der])
    odd.save(tmp_path / "https.pem")
    assert CertifiedKey.load(tmp_path / "https.pem") is None


def test_under_an_authority_that_cannot_be_read_is_nothing(authority: CertifiedKey) -> None:
    for der in (b"mine", with_unknown_curve(authority.certificate)):
        with pytest.raises(CertificateError, match="not under"):
            check_chain(server(authority).chain, der, NOW_MS)
