"""Options that several commands share, each with its environment variable, and the settings they make."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from node.errors import UserError
from node.settings import DEVICES, HIDDEN_BITS, NodeSettings, check_dialable, check_host, parse_memory

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
AdvertiseListen = Annotated[
    str | None,
    typer.Option(
        "--advertise-listen",
        envvar="POD_ADVERTISE_LISTEN",
        metavar="HOST:PORT",
        help="What others dial in place of --listen, such as a forwarded port.",
    ),
]
AdvertiseData = Annotated[
    str | None,
    typer.Option(
        "--advertise-data",
        envvar="POD_ADVERTISE_DATA",
        metavar="HOST:PORT",
        help="What others dial in place of --data.",
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
HiddenBits = Annotated[
    str,
    typer.Option(
        "--hidden-bits",
        envvar="POD_HIDDEN_BITS",
        metavar="|".join(HIDDEN_BITS),
        help="How hidden states travel to the next stage: 8 saves bytes, auto is 8 on long ways.",
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
Compile = Annotated[
    bool,
    typer.Option(
        "--compile/--no-compile",
        envvar="POD_COMPILE",
        help="Compile layers in the background where that makes them faster.",
    ),
]
Speculation = Annotated[
    bool,
    typer.Option(
        "--speculation/--no-speculation",
        envvar="POD_SPECULATION",
        help="Guess ahead in text that repeats, for requests to this node.",
    ),
]


Database = Annotated[
    str | None,
    typer.Option(
        "--db",
        envvar="POD_DB",
        metavar="URL",
        help="The ledger's database, such as postgresql+psycopg://user@host/name; remembered "
        "(default: SQLite in the state directory).",
    ),
]

TlsCert = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert",
        envvar="POD_TLS_CERT",
        metavar="FILE",
        help="A certificate (PEM, with its chain) for the API, in place of the pod's own.",
    ),
]
TlsKey = Annotated[
    Path | None,
    typer.Option(
        "--tls-key", envvar="POD_TLS_KEY", metavar="FILE", help="Its key (default: in the same file)."
    ),
]
InsecureHttp = Annotated[
    bool,
    typer.Option(
        "--insecure-http",
        envvar="POD_INSECURE_HTTP",
        help="Plain HTTP even at an --api address that other machines reach: keys and prompts are readable.",
    ),
]

MaxSessions = Annotated[
    int | None,
    typer.Option(
        "--max-sessions",
        envvar="POD_MAX_SESSIONS",
        min=1,
        max=4096,
        metavar="N",
        help="How many requests run at once on this node's layers (default: as many as its memory holds).",
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
    advertise_listen: str | None = None,
    advertise_data: str | None = None,
    compile_layers: bool = True,
    speculation: bool = True,
    hidden_bits: str = "16",
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    insecure_http: bool = False,
    database: str | None = None,
    max_num_sessions: int | None = None,
) -> NodeSettings:
    if device not in DEVICES:
        raise UserError(f"--device must be one of {', '.join(DEVICES)} (got {device!r})")
    if hidden_bits not in HIDDEN_BITS:
        raise UserError(f"--hidden-bits must be one of {', '.join(HIDDEN_BITS)} (got {hidden_bits!r})")
    if tls_key is not None and tls_cert is None:
        raise UserError("--tls-key needs --tls-cert")
    if tls_cert is not None and insecure_http:
        raise UserError("--insecure-http and --tls-cert exclude each other")
    if advertise is not None:
        check_host(advertise, "--advertise")
    if advertise_listen is not None:
        check_dialable(advertise_listen, "--advertise-listen")
    if advertise_data is not None:
        check_dialable(advertise_data, "--advertise-data")
    return NodeSettings(
        api_address=api,
        listen_address=listen,
        data_address=data,
        advertise_host=advertise,
        device=device,
        memory_bytes=parse_memory(memory) if memory else None,
        serve=serve,
        discover=discover,
        compile=compile_layers,
        speculation=speculation,
        advertise_listen=advertise_listen,
        advertise_data=advertise_data,
        hidden_bits=HIDDEN_BITS[hidden_bits],
        tls_cert=tls_cert,
        tls_key=tls_key or tls_cert,
        insecure_http=insecure_http,
        database=database,
        max_num_sessions=max_num_sessions,
    )
