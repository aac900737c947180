"""X.509 for HTTPS, all ECDSA P-256, because browsers and many clients take no Ed25519: the authority of the
pod (made once by its owner), issuers under it (admins' nodes), and the certificates of gateways. Pure but for
fresh keys and serial numbers; who may have what signed, `authority.py` decides.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from node.private_file import written_whole
from node.tls.names import EXCLUDED_ENDINGS, MAX_NUM_NAMES, address_of, general_name, is_signable, names_of

DAY_MS = 86_400_000
AUTHORITY_DAYS = 3650
ISSUER_DAYS = 180
SERVER_DAYS = 60
# Clocks of other machines may be behind.
BACKDATED_MS = DAY_MS
MAX_CSR_BYTES = 4096
MAX_CERTIFICATE_BYTES = 8192
MAX_NUM_CHAIN = 2

_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


class CertificateError(ValueError):
    """A certificate, key or request that cannot be used; the message is one line for people."""


@dataclass(frozen=True)
class CertifiedKey:
    """A private key and its certificate, followed by those that lead to the authority (which is left out)."""

    key: ec.EllipticCurvePrivateKey
    chain: tuple[x509.Certificate, ...]

    @property
    def certificate(self) -> x509.Certificate:
        return self.chain[0]

    @property
    def not_after_ms(self) -> int:
        return min(map(not_after_ms, self.chain))

    def is_past_half(self, now_ms: int) -> bool:
        """Time to renew: half of its life is over, so there is much time left to find somebody who signs."""
        begin_ms = int(self.certificate.not_valid_before_utc.timestamp() * 1000)
        return now_ms > (begin_ms + self.not_after_ms) // 2

    def save(self, path: Path) -> None:
        """One file, 0600, replaced as a whole. Raises UserError when it cannot be written."""
        pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        pem += b"".join(one.public_bytes(Encoding.PEM) for one in self.chain)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write(pem)

    @classmethod
    def load(cls, path: Path) -> CertifiedKey | None:
        """None when there is no such file or it is of no use; it is made anew then."""
        try:
            pem = path.read_bytes()
            key = load_pem_private_key(pem, password=None)
            chain = tuple(x509.load_pem_x509_certificates(pem))
            _read_all(chain)
        except Exception:  # the library raises several kinds for what others have signed
            return None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or chain[0].public_key() != key.public_key():
            return None
        return cls(key, chain)


def make_authority(pod: bytes, pod_name: str, now_ms: int) -> CertifiedKey:
    """A root that is good for servers with private names only, with at most one issuer between."""
    key = new_key()
    subject = _name(pod_name, f"gpu-pod authority {pod.hex()[:8]} {x509.random_serial_number() & 0xFFFF:04x}")
    excluded = [x509.DNSName(ending) for ending in EXCLUDED_ENDINGS]
    builder = (
        _builder(
            subject, subject, key.public_key(), key.public_key(), now_ms, now_ms + AUTHORITY_DAYS * DAY_MS
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
        .add_extension(
            x509.NameConstraints(permitted_subtrees=None, excluded_subtrees=excluded), critical=True
        )
    )
    return CertifiedKey(key, (builder.sign(key, hashes.SHA256()),))


def sign_issuer(
    authority: CertifiedKey, csr: bytes, node: bytes, pod_name: str, now_ms: int
) -> x509.Certificate:
    """A certificate with which `node` signs those of servers, and no further issuers. CertificateError."""
    request = _read_request(csr)
    end_ms = min(now_ms + ISSUER_DAYS * DAY_MS, authority.not_after_ms)
    builder = (
        _builder(
            _name(pod_name, f"gpu-pod issuer {node.hex()[:16]}"),
            authority.certificate.subject,
            _public_key(request),
            authority.key.public_key(),
            now_ms,
            end_ms,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    return builder.sign(authority.key, hashes.SHA256())


def sign_server(issuer: CertifiedKey, csr: bytes, pod_name: str, now_ms: int) -> x509.Certificate:
    """The certificate of a gateway for the names it asks for. Raises CertificateError for others."""
    request = _read_request(csr)
    names = _requested_names(request)
    end_ms = min(now_ms + SERVER_DAYS * DAY_MS, issuer.not_after_ms)
    return _server_builder(
        pod_name,
        names,
        issuer.certificate.subject,
        _public_key(request),
        issuer.key.public_key(),
        now_ms,
        end_ms,
    ).sign(issuer.key, hashes.SHA256())


def self_signed(names: Sequence[str], pod_name: str, now_ms: int) -> CertifiedKey:
    """What a gateway shows until an issuer has signed for it."""
    key = new_key()
    subject = _server_subject(pod_name, names)
    end_ms = now_ms + SERVER_DAYS * DAY_MS
    builder = _server_builder(pod_name, names, subject, key.public_key(), key.public_key(), now_ms, end_ms)
    return CertifiedKey(key, (builder.sign(key, hashes.SHA256()),))


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def request_of(key: ec.EllipticCurvePrivateKey, names: Sequence[str] = ()) -> bytes:
    """A signed request (DER) for a certificate of `key`."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        wanted = x509.SubjectAlternativeName([general_name(name) for name in names])
        builder = builder.add_extension(wanted, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def read_chain(ders: Sequence[bytes]) -> tuple[x509.Certificate, ...]:
    """Raises CertificateError."""
    if not 1 <= len(ders) <= MAX_NUM_CHAIN or any(len(der) > MAX_CERTIFICATE_BYTES for der in ders):
        raise CertificateError("not a chain of certificates")
    try:
        chain = tuple(x509.load_der_x509_certificate(der) for der in ders)
        _read_all(chain)
    except Exception as error:  # the library raises several kinds for hostile bytes
        raise CertificateError(f"not a certificate ({type(error).__name__})") from None
    return chain


def check_chain(chain: Sequence[x509.Certificate], authority_der: bytes, now_ms: int) -> None:
    """Raises CertificateError unless each is signed by the next, the last by the authority, and good now."""
    try:
        authority = x509.load_der_x509_certificate(authority_der)
        for one, signer in zip(chain, [*chain[1:], authority], strict=True):
            one.verify_directly_issued_by(signer)
    except Exception:  # the library raises several kinds for keys and algorithms it does not know
        raise CertificateError("it is not under the pod's authority") from None
    check_dates(chain, now_ms)


def check_dates(chain: Sequence[x509.Certificate], now_ms: int) -> None:
    for one in chain:
        if not_after_ms(one) < now_ms:
            raise CertificateError(f"the certificate expired on {one.not_valid_after_utc:%Y-%m-%d}")
        if one.not_valid_before_utc.timestamp() * 1000 > now_ms:
            raise CertificateError(
                f"the certificate is good from {one.not_valid_before_utc:%Y-%m-%d} on only"
            )


def is_self_signed(chain: Sequence[x509.Certificate]) -> bool:
    return len(chain) == 1 and chain[0].issuer == chain[0].subject


def covers(certificate: x509.Certificate, names: Sequence[str]) -> bool:
    return set(names) <= set(names_of(certificate))


def not_after_ms(certificate: x509.Certificate) -> int:
    return int(certificate.not_valid_after_utc.timestamp() * 1000)


def fingerprint(certificate: x509.Certificate) -> str:
    return fingerprint_of_der(certificate.public_bytes(Encoding.DER))


def fingerprint_of_der(der: bytes) -> str:
    """SHA-256 as browsers show it: pairs of hex digits with colons."""
    return hashlib.sha256(der).digest().hex(":").upper()


def _read_all(chain: Sequence[x509.Certificate]) -> None:
    """The library reads a certificate bit by bit. What is asked of it later is read here, so that one with a
    damaged part raises (any exception) where nothing else is.
    """
    for one in chain:
        one.public_key()
        is_self_signed([one])
        check_dates([one], not_after_ms(one))
        names_of(one)


def _read_request(csr: bytes) -> x509.CertificateSigningRequest:
    if len(csr) > MAX_CSR_BYTES:
        raise CertificateError("the request is too long")
    try:
        request = x509.load_der_x509_csr(csr)
        if not request.is_signature_valid:
            raise CertificateError("the request's signature does not match")
    except CertificateError:
        raise
    except Exception as error:  # the library raises several kinds for hostile bytes
        raise CertificateError(f"not a request for a certificate ({type(error).__name__})") from None
    return request


def _public_key(request: x509.CertificateSigningRequest) -> ec.EllipticCurvePublicKey:
    key = request.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CertificateError("only P-256 keys are signed")
    return key


def _requested_names(request: x509.CertificateSigningRequest) -> list[str]:
    try:
        names = names_of(request)
    except ValueError as error:
        raise CertificateError(f"the request is not understood: {error}") from None
    if not 1 <= len(names) <= MAX_NUM_NAMES:
        raise CertificateError(f"1 to {MAX_NUM_NAMES} names are signed, not {len(names)}")
    for name in names:
        if not is_signable(name):
            raise CertificateError(f"{name[:80]!r} is a public name, which the pod's authority does not sign")
    return names


def _server_subject(pod_name: str, names: Sequence[str]) -> x509.Name:
    hosts = [name for name in names if address_of(name) is None] or list(names) or ["gpu-pod"]
    return _name(pod_name, hosts[0][:64])


def _server_builder(
    pod_name: str,
    names: Sequence[str],
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    now_ms: int,
    end_ms: int,
) -> x509.CertificateBuilder:
    alternative = x509.SubjectAlternativeName([general_name(name) for name in names])
    return (
        _builder(_server_subject(pod_name, names), issuer, public, signer, now_ms, end_ms)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(alternative, critical=False)
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    now_ms: int,
    end_ms: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_date(now_ms - BACKDATED_MS))
        .not_valid_after(_date(end_ms))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _usage(*on: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{name: name in on for name in _USAGES})


def _name(pod_name: str, common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, pod_name),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _date(time_ms: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(time_ms // 1000, datetime.UTC)
