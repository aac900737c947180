"""Who may speak on the data plane: TLS contexts that trust exactly the certificates of the roster's nodes.

A value, replaced whole when the roster changes. Knows no roster: it is given the certificates.
"""

from __future__ import annotations

import os
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from node.links.port import LinkDown
from pod.identity import KeyPair, certificate_pem, key_pem, node_of_certificate

# X509_V_FLAG_PARTIAL_CHAIN; the ssl module has no name for it before Python 3.13.
_PARTIAL_CHAIN = 0x80000


class Trust:
    """The contexts for dialling and for listening, and the node each trusted certificate stands for."""

    def __init__(self, key: KeyPair, certificates: Sequence[bytes]) -> None:
        self._nodes = {certificate: node_of_certificate(certificate) for certificate in certificates}
        self.nodes = frozenset(self._nodes.values())
        trusted = b"".join(self._nodes)
        with _key_file(key) as path:
            self.dialling = _context(ssl.PROTOCOL_TLS_CLIENT, path, trusted)
            self.listening = _context(ssl.PROTOCOL_TLS_SERVER, path, trusted)
        # A resumed session would skip the certificate, and with it the check of membership.
        self.listening.num_tickets = 0

    def node_of(self, certificate: bytes | None) -> bytes:
        """Who is at the other end. Raises LinkDown unless it showed the very certificate of a roster node."""
        node = self._nodes.get(certificate or b"")
        if node is None:
            raise LinkDown("the peer's certificate is not in the roster")
        return node


def _context(protocol: ssl._SSLMethod, key_path: str, trusted: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VerifyFlags(_PARTIAL_CHAIN)
    context.load_cert_chain(key_path)
    if trusted:
        context.load_verify_locations(cadata=trusted)
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
