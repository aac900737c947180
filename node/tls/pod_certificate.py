"""The gateway's certificate under the pod's authority, kept in one file; until somebody has signed one, a
self-signed one that says so. Knows when to renew; `authority.py` knows who signs.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography import x509

from node.tls.authority import Authority
from node.tls.certificates import (
    CertificateError,
    CertifiedKey,
    check_chain,
    check_dates,
    covers,
    is_self_signed,
    self_signed,
)
from node.tls.names import split_names
from node.tls.shown import Shown, Source, server_context

log = logging.getLogger(__name__)

WAITING_NOTE = "no node that signs was reachable yet; the owner's and admins' do"


class PodCertificate:
    """`names` are what clients may call this gateway now, the particular ones first."""

    def __init__(
        self,
        authority: Authority,
        file: Path,
        pod_name: str,
        names: Callable[[], Sequence[str]],
        clock_ms: Callable[[], int],
    ) -> None:
        self._authority = authority
        self._file = file
        self._pod_name = pod_name
        self._names = names
        self._clock_ms = clock_ms
        self._held: CertifiedKey | None = None
        self._context = server_context()

    @property
    def context(self) -> ssl.SSLContext:
        return self._context

    @property
    def shown(self) -> Shown | None:
        if self._held is None:
            return None
        _, others = split_names(self._names())
        is_pods = self._is_pods(self._held)
        notes = [] if is_pods else [WAITING_NOTE]
        if others:
            notes.append(f"not for {', '.join(others)}: public names need --tls-cert")
        source = Source.POD if is_pods else Source.SELF_SIGNED
        return Shown(source, self._held.certificate, "; ".join(notes))

    @property
    def is_wanting(self) -> bool:
        return self._held is None or not self._is_pods(self._held)

    def start(self) -> None:
        names, _ = split_names(self._names())
        held = CertifiedKey.load(self._file)
        if held is not None and self._is_pods(held) and covers(held.certificate, names) and self._put(held):
            return
        made = self._authority.certify_here(names)
        if made is None and held is not None and self._is_usable(held, names):
            made = held
        if made is None or not self._put(made):
            self._put(self_signed(names, self._pod_name, self._clock_ms()))

    async def refresh(self) -> None:
        names, _ = split_names(self._names())
        held = self._held
        if (
            held is not None
            and self._is_pods(held)
            and covers(held.certificate, names)
            and not held.is_past_half(self._clock_ms())
        ):
            return
        made = await self._authority.certify(names)
        if made is not None and self._put(made):
            return
        if held is None or not self._is_usable(held, names):
            self._put(self_signed(names, self._pod_name, self._clock_ms()))

    def _put(self, held: CertifiedKey) -> bool:
        """Into the context and the file. False for what OpenSSL does not take."""
        if held is self._held:
            return True
        candidate = self._file.with_name(f"{self._file.stem}.candidate.pem")
        held.save(candidate)
        try:
            server_context().load_cert_chain(candidate)
            self._context.load_cert_chain(candidate)
            candidate.replace(self._file)
        except ssl.SSLError as error:
            log.warning("a certificate for HTTPS is of no use: %s", error)
            return False
        finally:
            candidate.unlink(missing_ok=True)
        self._held = held
        log.info("HTTPS with a certificate good until %s", _date(held.certificate))
        return True

    def _is_pods(self, held: CertifiedKey) -> bool:
        authority_der = self._authority.certificate_der
        if authority_der is None:
            return False
        try:
            check_chain(held.chain, authority_der, self._clock_ms())
        except CertificateError:
            return False
        return True

    def _is_usable(self, held: CertifiedKey, names: Sequence[str]) -> bool:
        """Nobody signs now: is what is held still better than a new self-signed one?"""
        if self._is_pods(held):
            return True
        try:
            check_dates(held.chain, self._clock_ms())
        except CertificateError:
            return False
        return is_self_signed(held.chain) and covers(held.certificate, names)


def _date(certificate: x509.Certificate) -> str:
    return f"{certificate.not_valid_after_utc:%Y-%m-%d}"
