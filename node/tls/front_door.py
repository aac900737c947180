"""Where this node's API is reached and how: plain HTTP on loopback; elsewhere HTTPS, under the authority of
the pod or with a certificate that was given, unless plain HTTP was asked for. What listens elsewhere has a
second, plain door on loopback for this machine's own `pod` commands.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Callable
from pathlib import Path

from node.errors import UserError
from node.gateway.serve import bind
from node.settings import NodeSettings, split_address
from node.tls.authority import Authority
from node.tls.certificates import CertificateError
from node.tls.given_certificate import GivenCertificate
from node.tls.names import address_of, wanted_names
from node.tls.pod_certificate import PodCertificate
from node.tls.shown import ServerCertificate, Source
from pod.address import dialable, host_port_of, multiaddr_of

CHECK_EVERY_S = 3600.0
ASK_AGAIN_S = 30.0
SETTLE_S = 0.2
LOOPBACK_HOST = "127.0.0.1"

log = logging.getLogger(__name__)


class FrontDoor:
    """`keep` runs for as long as the node does; `wake` says that roster or peers have changed."""

    def __init__(
        self,
        settings: NodeSettings,
        listener: socket.socket,
        authority: Authority,
        keys_dir: Path,
        pod_name: str,
        clock_ms: Callable[[], int],
    ) -> None:
        """Raises UserError when the certificate that was given is of no use, ListenError."""
        self._settings = settings
        self._authority = authority
        self._named_host = split_address(settings.api_address, "--api")[0]
        self._host, self._port = listener.getsockname()[:2]
        self._due = asyncio.Event()
        is_local = ipaddress.ip_address(self._host).is_loopback
        self.certificate: ServerCertificate | None = None
        if settings.tls_cert is not None and settings.tls_key is not None:
            self.certificate = GivenCertificate(settings.tls_cert, settings.tls_key, clock_ms)
        elif not is_local and settings.insecure_http:
            log.warning("the API at %s is plain HTTP: keys and prompts can be read on the way", self.api_url)
        elif not is_local:
            self.certificate = PodCertificate(
                authority, keys_dir / "https.pem", pod_name, self._names, clock_ms
            )
        if self.certificate is not None:
            self.certificate.start()
        is_plain_here = is_local and self.certificate is None
        self.plain = () if is_plain_here else (bind(LOOPBACK_HOST, 0),)

    @property
    def api_url(self) -> str:
        """What clients on other machines use."""
        scheme = "http" if self.certificate is None else "https"
        return f"{scheme}://{_in_url(self._settings.advertise_host or self._shown_host())}:{self._port}"

    @property
    def local_url(self) -> str:
        """What this machine's own commands use."""
        if not self.plain:
            return f"http://{_in_url(self._host)}:{self._port}"
        return f"http://{LOOPBACK_HOST}:{self.plain[0].getsockname()[1]}"

    def is_strict(self) -> bool:
        """Whether browsers may be told to use HTTPS only: any of them takes a certificate that was given."""
        shown = self.certificate.shown if self.certificate is not None else None
        return shown is not None and shown.source is Source.GIVEN

    def describe(self) -> dict[str, object] | None:
        """The certificate, as `pod status` shows it; None for plain HTTP."""
        shown = self.certificate.shown if self.certificate is not None else None
        return shown.as_json() if shown is not None else None

    def close(self) -> None:
        for listener in self.plain:
            listener.close()

    def wake(self) -> None:
        self._due.set()

    async def keep(self) -> None:
        """Renew what this node signs with and what it shows, in time."""
        while True:
            self._due.clear()
            try:
                await self._authority.refresh_issuer()
                if self.certificate is not None:
                    await self.certificate.refresh()
            except (OSError, UserError, CertificateError) as error:
                log.warning("the HTTPS certificate cannot be renewed: %s", error)
            except Exception:  # what others have signed must not stop this node
                log.exception("the HTTPS certificate cannot be renewed")
            is_wanting = self.certificate is not None and self.certificate.is_wanting
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), ASK_AGAIN_S if is_wanting else CHECK_EVERY_S)
            await asyncio.sleep(SETTLE_S)

    def _names(self) -> list[str]:
        names = wanted_names(
            self._named_host, self._settings.advertise_host, socket.gethostname(), self._interfaces()
        )
        if address_of(self._named_host) is None:
            names.append(self._host)
        return names

    def _shown_host(self) -> str:
        if not ipaddress.ip_address(self._host).is_unspecified:
            return self._named_host
        return next(iter(self._interfaces()), LOOPBACK_HOST)

    def _interfaces(self) -> list[str]:
        """The addresses at which others reach what listens everywhere, loopback last."""
        if not ipaddress.ip_address(self._host).is_unspecified:
            return []
        everywhere = ["0.0.0.0"] if self._host == "0.0.0.0" else ["0.0.0.0", "[::]"]  # noqa: S104
        found = dialable([multiaddr_of(f"{host}:{self._port}") for host in everywhere])
        hosts = [host_port_of(address)[0] for address in found]
        return sorted(hosts, key=lambda host: ipaddress.ip_address(host).is_loopback)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
