"""Who signs: Ed25519 keys of members, nodes, invites and API keys, their files, and what is computed from a
public key: the libp2p peer id and the X.509 certificate of the stage links. Does not know who is in a pod.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID

from pod import base58

# Multihash "identity" of a protobuf-encoded Ed25519 public key, as libp2p defines peer ids.
_PEER_ID_PREFIX = bytes.fromhex("002408011220")
SIGNATURE_BYTES = 64
# Fixed dates: membership is decided by the roster, never by a certificate's clock.
_NOT_BEFORE = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_NOT_AFTER = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)


class IdentityError(ValueError):
    """A key file, certificate or peer id that cannot be used; the message is one line for people."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """An Ed25519 key pair. `public` (32 bytes) is the id of the member, node, invite or key it stands for."""

    private: Ed25519PrivateKey
    public: bytes

    @classmethod
    def of_seed(cls, seed: bytes) -> KeyPair:
        private = Ed25519PrivateKey.from_private_bytes(seed)
        return cls(private, private.public_key().public_bytes_raw())

    @classmethod
    def create(cls) -> KeyPair:
        return cls.of_seed(Ed25519PrivateKey.generate().private_bytes_raw())

    @classmethod
    def load(cls, path: Path) -> KeyPair:
        """Raises IdentityError when the file is missing, damaged, or readable by others than its owner."""
        _refuse_shared_file(path)
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise IdentityError(f"{path}: not a readable private key ({type(error).__name__})") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise IdentityError(f"{path}: not an Ed25519 private key")
        return cls(key, key.public_key().public_bytes_raw())

    @classmethod
    def load_or_create(cls, path: Path) -> KeyPair:
        if path.exists():
            return cls.load(path)
        key = cls.create()
        key.save(path)
        return key

    def save(self, path: Path) -> None:
        """Writes a new 0600 file in a 0700 directory; never overwrites one."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key_pem(self))
            file.flush()
            os.fsync(file.fileno())

    @property
    def seed(self) -> bytes:
        return self.private.private_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        return self.private.sign(message)

    def __repr__(self) -> str:
        return f"KeyPair({short_name(self.public)})"


def verify(public: bytes, message: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def short_name(public: bytes) -> str:
    """Eight hex digits for people; never used to decide anything."""
    return public[:4].hex()


def peer_id(node: bytes) -> str:
    return base58.encode(_PEER_ID_PREFIX + node)


def node_of_peer_id(text: str) -> bytes:
    try:
        raw = base58.decode(text, max_num_characters=64)
    except ValueError as error:
        raise IdentityError(f"{text!r} is not a peer id: {error}") from None
    if len(raw) != len(_PEER_ID_PREFIX) + 32 or not raw.startswith(_PEER_ID_PREFIX):
        raise IdentityError(f"{text!r} is not the peer id of an Ed25519 key")
    return raw[len(_PEER_ID_PREFIX) :]


def certificate(key: KeyPair) -> bytes:
    """The self-signed certificate (DER) of a node key; the same key always gives the same bytes."""
    return _certificate(key.public, key.private)


def _certificate(node: bytes, signer: Ed25519PrivateKey) -> bytes:
    public_key = Ed25519PublicKey.from_public_bytes(node)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, peer_id(node))])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public_key)
        .serial_number(int.from_bytes(hashlib.sha256(node).digest()[:16], "big") | 1)
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public_key), critical=False)
    )
    return builder.sign(signer, algorithm=None).public_bytes(serialization.Encoding.DER)


def node_of_certificate(der: bytes) -> bytes:
    """The node id a certificate stands for. Raises IdentityError unless `certificate` makes these bytes.

    TLS libraries read names, dates and extensions more strictly, or less, than the one that checks here: so
    all but the signature must be what this node would write for that key.
    """
    try:
        parsed = x509.load_der_x509_certificate(der)
        public_key = parsed.public_key()
        if not isinstance(public_key, Ed25519PublicKey):
            raise IdentityError("the certificate's key is not Ed25519")
        node = public_key.public_bytes_raw()
        expected = _certificate(node, Ed25519PrivateKey.generate())
        if der[:-SIGNATURE_BYTES] != expected[:-SIGNATURE_BYTES]:
            raise IdentityError("not a node certificate as this pod's nodes make them")
        public_key.verify(der[-SIGNATURE_BYTES:], parsed.tbs_certificate_bytes)
    except IdentityError:
        raise
    except (InvalidSignature, ValueError, TypeError) as error:
        raise IdentityError(f"not a valid node certificate ({type(error).__name__})") from None
    return node


def certificate_pem(key: KeyPair) -> bytes:
    return x509.load_der_x509_certificate(certificate(key)).public_bytes(serialization.Encoding.PEM)


def key_pem(key: KeyPair) -> bytes:
    return key.private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _refuse_shared_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise IdentityError(f"{path}: {error.strerror}") from None
    if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        raise IdentityError(
            f"{path}: readable by others (mode {stat.S_IMODE(mode):04o}); run: chmod 600 {path}"
        )
