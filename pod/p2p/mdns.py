"""Finds nodes of the same pod on the local network by multicast DNS. What it hears is a hint where a node may
listen; the handshake proves who is there. The pod is announced as a hash, not by its id or name.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Final

from zeroconf import ServiceBrowser, ServiceInfo, ServiceListener, Zeroconf

from pod.address import host_port_of
from pod.identity import IdentityError, node_of_peer_id, peer_id

SERVICE: Final = "_gpu-pod._tcp.local."
MAX_NUM_ADDRESSES = 8

log = logging.getLogger("pod.p2p")


class LanDiscovery(ServiceListener):
    """`on_found` is called in a thread of zeroconf's with a node and its addresses."""

    def __init__(
        self,
        pod: bytes,
        node: bytes,
        addresses: Sequence[str],
        on_found: Callable[[bytes, tuple[str, ...]], None],
        interfaces: Sequence[str] | None = None,
    ) -> None:
        self._tag = hashlib.sha256(b"gpu-pod lan\0" + pod).digest()[:8].hex()
        self._node = node
        self._addresses = list(addresses)[:MAX_NUM_ADDRESSES]
        self._on_found = on_found
        self._interfaces = interfaces
        self._zeroconf: Zeroconf | None = None

    def start(self) -> None:
        """Blocks for about a second. Without multicast on this machine it logs once and does nothing."""
        try:
            self._zeroconf = Zeroconf(list(self._interfaces)) if self._interfaces else Zeroconf()
            self._zeroconf.register_service(self._own_service(), allow_name_change=False)
            ServiceBrowser(self._zeroconf, SERVICE, self)
        except Exception as error:
            log.warning("no discovery on the local network: %s", error)
            self.stop()

    def stop(self) -> None:
        if self._zeroconf is not None:
            self._zeroconf.close()
            self._zeroconf = None

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        try:
            info = zc.get_service_info(type_, name, timeout=2000)
            if info is not None:
                self._consider(name, info.decoded_properties)
        except Exception as error:
            log.debug("a service on the local network makes no sense: %r", error)

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self.add_service(zc, type_, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """Liveness is the heartbeat's business."""

    def _consider(self, name: str, properties: dict[str, str | None]) -> None:
        if properties.get("pod") != self._tag:
            return
        try:
            node = node_of_peer_id(name.removesuffix("." + SERVICE))
        except IdentityError:
            return
        found = [properties.get(f"a{index}") for index in range(MAX_NUM_ADDRESSES)]
        addresses = tuple(address for address in found if address)
        if node != self._node and addresses:
            self._on_found(node, addresses)

    def _own_service(self) -> ServiceInfo:
        name = peer_id(self._node)
        properties = {"pod": self._tag} | {f"a{n}": one for n, one in enumerate(self._addresses)}
        port = host_port_of(self._addresses[0])[1]
        return ServiceInfo(
            SERVICE,
            f"{name}.{SERVICE}",
            port=port,
            properties=properties,
            server=f"{name}.local.",
            parsed_addresses=self._ips(),
        )

    def _ips(self) -> list[str]:
        """A service without an address is never complete for whoever looks it up."""
        hosts = [host_port_of(address)[0] for address in self._addresses]
        return [host for host in hosts if ":" in host or host.replace(".", "").isdigit()] or ["127.0.0.1"]
