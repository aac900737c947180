"""What a gateway shows its clients: one TLS context for the life of the node, into which newer certificates
are put (connections that are open keep the old one), and what is said of the one that is in it.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from cryptography import x509

from node.tls.certificates import fingerprint, not_after_ms
from node.tls.names import names_of


class Source(StrEnum):
    """Where a certificate is from."""

    POD = "pod"
    SELF_SIGNED = "self-signed"
    GIVEN = "given"


@dataclass(frozen=True, slots=True)
class Shown:
    """`note` says in one line what is wrong with it, or nothing."""

    source: Source
    certificate: x509.Certificate
    note: str = ""

    def as_json(self) -> dict[str, object]:
        return {
            "source": str(self.source),
            "fingerprint_sha256": fingerprint(self.certificate),
            "not_after_ms": not_after_ms(self.certificate),
            "names": names_of(self.certificate),
            "note": self.note,
        }


class ServerCertificate(Protocol):
    """`start` before the gateway listens, `refresh` from time to time afterwards."""

    @property
    def context(self) -> ssl.SSLContext: ...

    @property
    def shown(self) -> Shown | None: ...

    def start(self) -> None:
        """Put a certificate into the context. Raises UserError."""
        ...

    async def refresh(self) -> None:
        """Put a newer one in, if it is time and there is one."""
        ...

    @property
    def is_wanting(self) -> bool:
        """Whether it should look again soon."""
        ...


def server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context
