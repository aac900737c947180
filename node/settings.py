"""Everything a node can be told from outside, read once: command-line options first, then the environment.

The only file that reads the environment for the node's own options.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from node.errors import UserError

Device = Literal["auto", "cpu", "cuda", "mps", "xpu"]
DEVICES: tuple[str, ...] = get_args(Device)

DEFAULT_API_ADDRESS = "127.0.0.1:8420"
DEFAULT_LISTEN_ADDRESS = "0.0.0.0:8421"
DEFAULT_DATA_ADDRESS = "0.0.0.0:8422"

HIDDEN_BITS = {"16": 16, "8": 8, "auto": 0}
"""How hidden states travel to the next stage: as the layers compute them, in 8 bits, or in 8 on long ways."""

_UNITS_BYTES = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """`advertise_host` is the name or address other nodes dial; None: found out from the interfaces.

    `database` is the URL of the ledger's database; None: the one it has. `max_num_sessions` run at once on
    this node's layers, the others wait; None: as many as there is room for.
    `advertise_listen` and `advertise_data` (host:port) are dialled in place of `listen_address` and
    `data_address`, where a forwarded port or a relay stands before this node. `tls_cert` and `tls_key` are
    files in PEM form; `insecure_http`: no TLS at an `api_address` that others reach.
    """

    api_address: str = DEFAULT_API_ADDRESS
    listen_address: str = DEFAULT_LISTEN_ADDRESS
    data_address: str = DEFAULT_DATA_ADDRESS
    advertise_host: str | None = None
    device: str = "auto"
    memory_bytes: int | None = None
    serve: bool = True
    discover: bool = True
    compile: bool = True
    speculation: bool = True
    advertise_listen: str | None = None
    advertise_data: str | None = None
    hidden_bits: int = 16
    tls_cert: Path | None = None
    tls_key: Path | None = None
    insecure_http: bool = False
    database: str | None = None
    max_num_sessions: int | None = None


def split_address(text: str, option: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` -> (host, port). Port 0 asks the system for a free one."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"{option} must be HOST:PORT, such as 127.0.0.1:8420 (got {text!r})")
    return host.strip("[]"), int(port)


def check_host(text: str, option: str) -> str:
    """A host name or an address, as others can dial it."""
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|[0-9A-Fa-f:]{2,45}", text):
        raise UserError(f"{option} must be a host name or an address (got {text!r})")
    return text


def check_dialable(text: str, option: str) -> str:
    """HOST:PORT as others can dial it."""
    host, port = split_address(text, option)
    check_host(host, option)
    if not port:
        raise UserError(f"{option} must name the port that others dial (got {text!r})")
    return text


def parse_memory(text: str) -> int:
    """`8GiB`, `500MB`, `1.5g` -> bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    num_bytes = int(float(match[1]) * _UNITS_BYTES[match[2] or ""]) if match is not None else 0
    if num_bytes < 1:
        raise UserError(f"--memory must be a size such as 8GiB (got {text!r})")
    return num_bytes


def parse_duration_s(text: str) -> int:
    """`24h`, `30m`, `7d`, `90s` -> seconds."""
    match = re.fullmatch(r"(\d+)\s*([smhd])", text.strip().lower())
    if match is None or int(match[1]) == 0:
        raise UserError(f"a duration must look like 24h, 30m or 7d (got {text!r})")
    seconds = int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    if seconds > 10 * 365 * 86400:
        raise UserError(f"{text!r} is longer than ten years")
    return seconds
