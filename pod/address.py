"""Addresses as people write them (host:port) and as libp2p does (multiaddrs), and which of this machine's
addresses others could dial. Knows no libp2p.
"""

from __future__ import annotations

import ipaddress

import psutil

from pod.identity import peer_id


class AddressError(ValueError):
    """Text that is no address; the message is one line for people."""


def multiaddr_of(text: str) -> str:
    """`host:port` or `[ip6]:port` as a TCP multiaddr; a multiaddr stays as it is."""
    if text.startswith("/"):
        return text
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise AddressError(f"{text!r} is not host:port")
    host = host.strip("[]") or "0.0.0.0"  # noqa: S104  # what an empty host means everywhere
    return f"/{_family(host)}/{host}/tcp/{int(port)}"


def host_port_of(multiaddr: str) -> tuple[str, int]:
    """Of a TCP multiaddr, with or without a peer id behind it."""
    parts = multiaddr.split("/")
    if len(parts) < 5 or parts[3] != "tcp" or not parts[4].isdigit():
        raise AddressError(f"{multiaddr!r} is not a TCP multiaddr")
    return parts[2], int(parts[4])


def with_peer(multiaddr: str, node: bytes) -> str:
    return multiaddr if "/p2p/" in multiaddr else f"{multiaddr}/p2p/{peer_id(node)}"


def is_loopback(multiaddr: str) -> bool:
    try:
        return ipaddress.ip_address(host_port_of(multiaddr)[0]).is_loopback
    except ValueError:
        return False


def dialable(listening: list[str]) -> list[str]:
    """The addresses others may dial: those of every interface where all of them are listened on."""
    found: list[str] = []
    for address in listening:
        host, port = host_port_of(address)
        suffix = address[address.find("/p2p/") :] if "/p2p/" in address else ""
        if host in ("0.0.0.0", "::"):  # noqa: S104  # compared, not bound
            hosts = _interface_hosts(6 if host == "::" else 4)
            found += [f"/{_family(one)}/{one}/tcp/{port}{suffix}" for one in hosts]
        else:
            found.append(address)
    return found


def _interface_hosts(version: int) -> list[str]:
    """Loopback last: it only helps nodes on the same machine."""
    hosts = []
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            try:
                ip = ipaddress.ip_address(address.address.partition("%")[0])
            except ValueError:
                continue
            if ip.version == version and not ip.is_link_local:
                hosts.append((ip.is_loopback, str(ip)))
    return [host for _, host in sorted(hosts)]


def _family(host: str) -> str:
    try:
        return f"ip{ipaddress.ip_address(host).version}"
    except ValueError:
        return "dns4"
