"""Which host names and addresses a gateway's certificate is for, and which ones the pod's authority signs.

The authority vouches for private names only: whoever installs it in a browser trusts it with nothing of the
public web. A name with a public ending needs a certificate of its own (`--tls-cert`).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from itertools import product
from string import ascii_lowercase

from cryptography import x509

MAX_NUM_NAMES = 24
MAX_NUM_ADDRESSES = 12
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")

PRIVATE_ENDINGS = frozenset(
    ("local", "lan", "internal", "home", "corp", "private", "intranet", "localdomain", "localhost", "test")
)

# What no certificate under a pod's authority is ever good for, as far as names can be excluded by their
# endings: the authority's certificate says so itself, and clients check it.
EXCLUDED_ENDINGS: tuple[str, ...] = (
    *("".join(letters) for letters in product(ascii_lowercase, repeat=2)),
    *("com", "net", "org", "edu", "gov", "mil", "int", "info", "biz", "name", "pro", "mobi", "asia"),
    *("app", "dev", "page", "cloud", "online", "site", "store", "shop", "tech", "xyz", "top", "club", "live"),
    *("google", "microsoft", "apple", "amazon", "bank", "health", "world", "today", "life", "email", "work"),
    *("blog", "space", "website", "news", "media", "digital", "network", "systems", "solutions", "services"),
)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_signable(name: str) -> bool:
    """An IP address, a single label, or a name with a private ending."""
    if address_of(name) is not None:
        return True
    labels = name.split(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        return False
    # "home.arpa" is the ending that RFC 8375 sets aside for homes.
    if len(labels) == 1:
        return labels[0] not in EXCLUDED_ENDINGS
    return labels[-1] in PRIVATE_ENDINGS or labels[-2:] == ["home", "arpa"]


def wanted_names(api_host: str, advertised: str | None, machine: str, interfaces: Iterable[str]) -> list[str]:
    """What clients may call this gateway, most particular first, without repeats.

    `api_host` is the address of `--api`; when that means every interface, `interfaces` are added. `machine`
    is the host's own name, with or without its domain, and is left out where nobody would sign it.
    """
    found = [advertised] if advertised else []
    listening = address_of(api_host)
    if api_host and not (listening and listening.is_unspecified):
        found.append(api_host)
    else:
        found += list(interfaces)[:MAX_NUM_ADDRESSES]
    short = machine.split(".")[0]
    own = [name for name in (machine.lower(), short.lower(), f"{short.lower()}.local") if is_signable(name)]
    found += [*own, "localhost", "127.0.0.1", "::1"]
    return list(dict.fromkeys(canonical for name in found if (canonical := _canonical(name))))


def split_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those the pod's authority signs, and the others."""
    signable = [name for name in names if is_signable(name)]
    return signable[:MAX_NUM_NAMES], [name for name in names if not is_signable(name)]


def address_of(name: str) -> Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def general_name(name: str) -> x509.GeneralName:
    address = address_of(name)
    return x509.DNSName(name) if address is None else x509.IPAddress(address)


def names_of(certificate: x509.Certificate | x509.CertificateSigningRequest) -> list[str]:
    """Its alternative names, as `general_name` takes them. Raises ValueError for other kinds of names."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    found = []
    for name in extension.value:
        if not isinstance(name, x509.DNSName | x509.IPAddress):
            raise ValueError("names other than host names and addresses")
        found.append(str(name.value))
    return found


def _canonical(name: str) -> str:
    """Lower case, one form per address; "" for what no certificate can hold."""
    address = address_of(name)
    if address is not None:
        return str(address)
    name = name.lower().rstrip(".")
    return name if len(name) <= 253 and all(map(_LABEL.fullmatch, name.split("."))) else ""
