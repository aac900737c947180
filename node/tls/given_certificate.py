"""A certificate and key in files of the user's (`--tls-cert`, `--tls-key`), read again when they change."""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from node.errors import UserError
from node.tls.certificates import CertificateError, check_dates
from node.tls.shown import Shown, Source, server_context

MAX_FILE_BYTES = 256 * 1024

log = logging.getLogger(__name__)


class GivenCertificate:
    def __init__(self, certificate_file: Path, key_file: Path, clock_ms: Callable[[], int]) -> None:
        self._files = (certificate_file, key_file)
        self._clock_ms = clock_ms
        self._context = server_context()
        self._shown: Shown | None = None
        self._stamps: tuple[float, ...] = ()

    @property
    def context(self) -> ssl.SSLContext:
        return self._context

    @property
    def shown(self) -> Shown | None:
        return self._shown

    @property
    def is_wanting(self) -> bool:
        return False

    def start(self) -> None:
        """Raises UserError: missing, unreadable, damaged, mismatched or expired files."""
        stamps = self._read_stamps()
        certificate = self._check()
        certificate_file, key_file = self._files
        try:
            self._context.load_cert_chain(certificate_file, key_file, password=_no_password)
        except (OSError, ssl.SSLError) as error:
            raise UserError(f"{certificate_file} and {key_file} cannot be used: {error}") from None
        self._stamps = stamps
        self._shown = Shown(Source.GIVEN, certificate)

    async def refresh(self) -> None:
        """What cannot be used is reported, and the old one stays."""
        if self._read_stamps() == self._stamps:
            return
        try:
            self.start()
            log.info("the certificate in %s was read again", self._files[0])
        except UserError as error:
            log.warning("the HTTPS certificate is not renewed: %s", error)

    def _read_stamps(self) -> tuple[float, ...]:
        return tuple(os.stat(file).st_mtime if file.exists() else 0.0 for file in self._files)

    def _check(self) -> x509.Certificate:
        certificate_file, key_file = self._files
        chain, key = _read_certificates(certificate_file), _read_key(key_file)
        if chain[0].public_key() != key.public_key():
            raise UserError(f"the key in {key_file} does not belong to the certificate in {certificate_file}")
        try:
            check_dates(chain[:1], self._clock_ms())
        except CertificateError as error:
            raise UserError(f"{certificate_file}: {error}") from None
        return chain[0]


def _read_certificates(file: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read(file, "--tls-cert"))
    except ValueError:
        raise UserError(f"{file} is no certificate in PEM form (--tls-cert)") from None


def _read_key(file: Path) -> PrivateKeyTypes:
    try:
        return load_pem_private_key(_read(file, "--tls-key"), password=None)
    except TypeError:
        raise UserError(f"the key in {file} is encrypted; give one without a password (--tls-key)") from None
    except Exception:  # the library raises several kinds for damaged keys
        raise UserError(f"{file} is no private key in PEM form (--tls-key)") from None


def _read(file: Path, option: str) -> bytes:
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{file} is too large for what {option} needs")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file} ({option}): {error.strerror}") from None


def _no_password() -> str:
    """Never ask on the terminal."""
    return ""
