"""Options that several commands share, each with its environment variable, and the settings they make."""

from __future__ import annotations

from typing import Annotated

import typer

from node.errors import UserError
from node.settings import DEVICES, NodeSettings, check_host, parse_memory

MemberName = Annotated[
    str | None,
    typer.Option("--member", envvar="POD_MEMBER", help="Your name in the pod (default: your login)."),
]
NoServe = Annotated[bool, typer.Option("--no-serve", help="Use the pod without serving layers.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Api = Annotated[
    str,
    typer.Option(
        "--api", envvar="POD_API", metavar="HOST:PORT", help="Where the OpenAI API and the dashboard listen."
    ),
]
Listen = Annotated[
    str,
    typer.Option(
        "--listen",
        envvar="POD_LISTEN",
        metavar="HOST:PORT",
        help="Where other nodes reach the control plane.",
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data", envvar="POD_DATA", metavar="HOST:PORT", help="Where other nodes reach the stage links."
    ),
]
Advertise = Annotated[
    str | None,
    typer.Option(
        "--advertise",
        envvar="POD_ADVERTISE",
        metavar="HOST",
        help="Name or address other nodes dial (default: found out).",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", envvar="POD_DEVICE", metavar="|".join(DEVICES), help="What computes the layers."
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        envvar="POD_MEMORY",
        metavar="SIZE",
        help="Most memory for layers and KV cache, such as 8GiB (default: 80% of what is free).",
    ),
]
NodeName = Annotated[
    str | None,
    typer.Option(
        "--node-name", envvar="POD_NODE_NAME", help="This machine's name in the pod (default: its host name)."
    ),
]
Discover = Annotated[
    bool,
    typer.Option(
        "--discover/--no-discover", envvar="POD_DISCOVER", help="Find nodes of this pod on the LAN (mDNS)."
    ),
]


def node_settings(
    api: str,
    listen: str,
    data: str,
    advertise: str | None,
    device: str,
    memory: str | None,
    discover: bool,
    serve: bool = True,
) -> NodeSettings:
    if device not in DEVICES:
        raise UserError(f"--device must be one of {', '.join(DEVICES)} (got {device!r})")
    if advertise is not None:
        check_host(advertise, "--advertise")
    return NodeSettings(
        api, listen, data, advertise, device, parse_memory(memory) if memory else None, serve, discover
    )
