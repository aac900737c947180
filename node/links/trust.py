"""Who may speak on the data plane: TLS contexts that trust exactly the certificates of the roster's nodes.

A value, replaced whole when the roster changes. Knows no roster: it is given the certificates. One that
cannot be used shuts out its own node and nobody else.
"""

from __future__ import annotations

import logging
import os
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from node.links.port import LinkDown
from pod.identity import IdentityError, KeyPair, certificate_pem, key_pem, node_of_certificate

# X509_V_FLAG_PARTIAL_CHAIN; the ssl module has no name for it before Python 3.13.
_PARTIAL_CHAIN = 0x80000
_log = logging.getLogger(__name__)


class Trust:
    """The contexts for dialling and for listening, and the node each trusted certificate stands for."""

    def __init__(self, key: KeyPair, certificates: Sequence[bytes]) -> None:
        with _key_file(key) as path:
            self.dialling = _context(ssl.PROTOCOL_TLS_CLIENT, path)
            self.listening = _context(ssl.PROTOCOL_TLS_SERVER, path)
        # A resumed session would skip the certificate, and with it the check of membership.
        self.listening.num_tickets = 0
        self._nodes: dict[bytes, bytes] = {}
        for certificate in certificates:
            self._add(certificate)
        self.nodes = frozenset(self._nodes.values())

    def _add(self, certificate: bytes) -> None:
        """Each on its own: OpenSSL takes or refuses what it is given as a whole."""
        try:
            node = node_of_certificate(certificate)
            for context in (self.dialling, self.listening):
                context.load_verify_locations(cadata=certificate)
        except (IdentityError, ssl.SSLError, ValueError) as error:
            _log.warning("a certificate in the roster is of no use, its node is not trusted: %s", error)
        else:
            self._nodes[certificate] = node

    def node_of(self, certificate: bytes | None) -> bytes:
        """Who is at the other end. Raises LinkDown unless it showed the very certificate of a roster node."""
        node = self._nodes.get(certificate or b"")
        if node is None:
            raise LinkDown("the peer's certificate is not in the roster")
        return node


def _context(protocol: ssl._SSLMethod, key_path: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VerifyFlags(_PARTIAL_CHAIN)
    context.load_cert_chain(key_path)
    return context


@contextmanager
def _key_file(key: KeyPair) -> Iterator[str]:
    """OpenSSL wants a path: one in memory where the system has that, else a private file for a moment."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("node-key")
        path = f"/proc/self/fd/{descriptor}"
    else:
        descriptor, path = tempfile.mkstemp()
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(certificate_pem(key) + key_pem(key))
            file.flush()
            yield path
    finally:
        if not path.startswith("/proc/"):
            os.unlink(path)
