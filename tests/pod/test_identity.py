"""Keys on disk, peer ids and certificates, and that stdlib TLS 1.3 takes the certificates both ways."""

from __future__ import annotations

import os
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509

from pod.identity import (
    IdentityError,
    KeyPair,
    certificate,
    certificate_pem,
    key_pem,
    node_of_certificate,
    node_of_peer_id,
    peer_id,
    verify,
)
from tests.pod.people import key_of


def test_a_key_is_created_once_private_and_the_same_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "node.pem"
    key = KeyPair.load_or_create(path)
    assert KeyPair.load_or_create(path).public == key.public
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert key.seed.hex() not in repr(key)


def test_a_key_others_can_read_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "node.pem"
    KeyPair.create().save(path)
    os.chmod(path, 0o640)
    with pytest.raises(IdentityError, match="chmod 600"):
        KeyPair.load(path)


def test_a_damaged_or_missing_key_file_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "node.pem"
    with pytest.raises(IdentityError, match="No such file"):
        KeyPair.load(path)
    KeyPair.create().save(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(IdentityError, match="not a readable private key"):
        KeyPair.load(path)
    with pytest.raises(FileExistsError):
        KeyPair.create().save(path)


def test_a_signature_holds_for_its_message_and_key_only() -> None:
    key = key_of("a")
    signature = key.sign(b"words")
    assert verify(key.public, b"words", signature)
    assert not verify(key.public, b"other words", signature)
    assert not verify(key_of("b").public, b"words", signature)
    assert not verify(key.public, b"words", signature[:-1])
    assert not verify(b"short", b"words", signature)


def test_peer_ids_go_both_ways_and_other_text_is_refused() -> None:
    node = key_of("a").public
    assert peer_id(node).startswith("12D3KooW")
    assert node_of_peer_id(peer_id(node)) == node
    for text in ("", "12D3KooW", "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG", "0OIl", "1" * 1000):
        with pytest.raises(IdentityError):
            node_of_peer_id(text)


def test_the_certificate_is_the_same_every_time_and_names_its_node() -> None:
    key = key_of("a")
    der = certificate(key)
    assert der == certificate(key)
    assert node_of_certificate(der) == key.public
    damaged = bytearray(der)
    damaged[-1] ^= 1
    for other in (bytes(damaged), b"", der[:50]):
        with pytest.raises(IdentityError):
            node_of_certificate(other)


@pytest.mark.parametrize(
    ("honest", "crafted"),
    [
        (
            peer_id(key_of("a").public).encode(),
            b"\xff\xfe\xff\xfe" + peer_id(key_of("a").public)[4:].encode(),
        ),
        (b"200101000000Z", b"210101000000Z"),
    ],
)
def test_a_certificate_that_others_cannot_read_or_read_differently_is_refused(
    honest: bytes, crafted: bytes
) -> None:
    """Names that are no UTF-8 pass one parser and make another refuse the whole list of trusted nodes."""
    key = key_of("a")
    der = certificate(key)
    tbs = x509.load_der_x509_certificate(der).tbs_certificate_bytes.replace(honest, crafted)
    twisted = der.replace(honest, crafted)[:-64] + key.sign(tbs)
    x509.load_der_x509_certificate(twisted)
    with pytest.raises(IdentityError):
        node_of_certificate(twisted)


def test_tls_trusts_exactly_the_certificates_it_was_given(tmp_path: Path) -> None:
    assert _handshake(tmp_path, key_of("a"), key_of("b"), trusted=key_of("b")) == key_of("b").public
    with pytest.raises(ssl.SSLError):
        _handshake(tmp_path, key_of("a"), key_of("outsider"), trusted=key_of("b"))


def _handshake(tmp_path: Path, one: KeyPair, other: KeyPair, trusted: KeyPair) -> bytes:
    """Two TLS 1.3 ends in memory; the node the accepting end sees."""
    accepting = _context(tmp_path, ssl.PROTOCOL_TLS_SERVER, one, trusted)
    dialling = _context(tmp_path, ssl.PROTOCOL_TLS_CLIENT, other, one)
    to_accepting, to_dialling = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        dialling.wrap_bio(to_dialling, to_accepting),
        accepting.wrap_bio(to_accepting, to_dialling, server_side=True),
    )
    for end in ends * 2:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
    der = ends[1].getpeercert(binary_form=True)
    assert der is not None
    return node_of_certificate(der)


def _context(tmp_path: Path, protocol: int, own: KeyPair, trusted: KeyPair) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= 0x80000  # partial chain
    context.load_verify_locations(cadata=certificate(trusted))
    path = tmp_path / f"{peer_id(own.public)}.pem"
    path.write_bytes(key_pem(own) + certificate_pem(own))
    context.load_cert_chain(path)
    return context
