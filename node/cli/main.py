"""The command line: every `pod` command, its options and help. Each calls one operation, shows its result."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from node.cli import show
from node.cli.call import Json, perform, require_pod, this_home
from node.errors import UserError
from node.settings import (
    DEFAULT_API_ADDRESS,
    DEFAULT_DATA_ADDRESS,
    DEFAULT_LISTEN_ADDRESS,
    DEVICES,
    NodeSettings,
    parse_duration_s,
    parse_memory,
)

app = typer.Typer(
    name="pod",
    help="A private pool of GPUs for a team. Start with `pod create NAME`, or `pod demo` to see it work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
model_app = typer.Typer(help="What the pod should serve.", no_args_is_help=True)
key_app = typer.Typer(help="API keys of this member, valid at every node.", no_args_is_help=True)
members_app = typer.Typer(help="Who is in the pod.", invoke_without_command=True)
ledger_app = typer.Typer(
    help="The books: balances, recent requests, verification.", invoke_without_command=True
)
app.add_typer(model_app, name="model")
app.add_typer(key_app, name="key")
app.add_typer(members_app, name="members")
app.add_typer(ledger_app, name="ledger")

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
        help="Name or address other nodes dial [default: found out].",
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
        help="Most memory for layers and KV cache, such as 8GiB [default: 80% of what is free].",
    ),
]
NodeName = Annotated[
    str | None,
    typer.Option(
        "--node-name", envvar="POD_NODE_NAME", help="This machine's name in the pod [default: its host name]."
    ),
]
Discover = Annotated[
    bool,
    typer.Option(
        "--discover/--no-discover", envvar="POD_DISCOVER", help="Find nodes of this pod on the LAN (mDNS)."
    ),
]


def _settings(
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
    return NodeSettings(
        api, listen, data, advertise, device, parse_memory(memory) if memory else None, serve, discover
    )


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="The pod's name.")],
    member: Annotated[
        str | None,
        typer.Option("--member", envvar="POD_MEMBER", help="Your name in the pod [default: your login]."),
    ] = None,
    node_name: NodeName = None,
    as_json: AsJson = False,
) -> None:
    """Create a pod: this machine becomes its first node, you its owner."""
    from node.office import create_pod, machine_name

    result = create_pod(this_home(), name, member or _login_name(), node_name or machine_name())
    if as_json:
        return show.print_json(result)
    show.out.print(
        f"Pod [bold]{result['pod_name']}[/] created. You are its owner, [bold]{result['member']}[/]."
    )
    show.out.print(f"State: {result['home']}\n\nNext:")
    for command, purpose in (
        ("pod model add smollm2-135m", "choose what the pod serves"),
        ("pod up", "run this machine's node"),
        ("pod invite", "let somebody else in"),
        ("pod key create", "make a key for your tools"),
    ):
        show.out.print(f"  {command:<28} {purpose}")
    return None


@app.command()
def invite(
    uses: Annotated[
        int, typer.Option("--uses", min=1, max=1000, help="How many machines may join with it.")
    ] = 1,
    expires: Annotated[str, typer.Option("--expires", help="How long it is good for: 30m, 24h, 7d.")] = "24h",
    role: Annotated[
        str,
        typer.Option(
            "--role", help="member (serve and use), admin (invite, remove, models) or guest (use only)."
        ),
    ] = "member",
    revoke: Annotated[
        str | None, typer.Option("--revoke", metavar="ID", help="Revoke the invite with this id instead.")
    ] = None,
    advertise: Advertise = None,
    listen: Listen = DEFAULT_LISTEN_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Make an invite. It is printed once, here; hand it over on a private channel."""
    if revoke is not None:
        result = perform("invite_revoke", {"invite_id": revoke})
        return show.print_json(result) if as_json else show.out.print(f"Invite {revoke} is revoked.")
    arguments: Json = {
        "uses": uses,
        "expires_s": parse_duration_s(expires),
        "role": role,
        "advertise_host": advertise,
        "listen_address": listen,
    }
    result = perform("invite", arguments)
    if as_json:
        return show.print_json(result)
    until = show.time_text(result["expires_ms"])
    show.err.print(f"Invite {result['invite_id']} as {role}, uses: {uses}, until {until}. Shown once:")
    print(result["invite"])
    show.err.print("The other machine says: pod join <invite>")
    return None


@app.command()
def join(
    invite: Annotated[str, typer.Argument(help="What `pod invite` printed.")],
    member: Annotated[
        str | None,
        typer.Option("--member", envvar="POD_MEMBER", help="Your name in the pod [default: your login]."),
    ] = None,
    no_serve: Annotated[bool, typer.Option("--no-serve", help="Use the pod without serving layers.")] = False,
    node_name: NodeName = None,
    api: Api = DEFAULT_API_ADDRESS,
    listen: Listen = DEFAULT_LISTEN_ADDRESS,
    data: Data = DEFAULT_DATA_ADDRESS,
    advertise: Advertise = None,
    device: DeviceOption = "auto",
    memory: Memory = None,
    discover: Discover = True,
    as_json: AsJson = False,
) -> None:
    """Join a pod with an invite, then run this machine's node in the foreground."""
    from node.office import machine_name
    from node.process import join_pod, run_node

    settings = _settings(api, listen, data, advertise, device, memory, discover, serve=not no_serve)
    home = this_home()
    result = join_pod(home, invite, member or _login_name(), node_name or machine_name())
    if not as_json:
        show.out.print(
            f"Joined pod [bold]{result['pod_name']}[/] as [bold]{result['member']}[/] ({result['role']})."
        )
    run_node(home, settings, as_json)


@app.command()
def up(
    api: Api = DEFAULT_API_ADDRESS,
    listen: Listen = DEFAULT_LISTEN_ADDRESS,
    data: Data = DEFAULT_DATA_ADDRESS,
    advertise: Advertise = None,
    device: DeviceOption = "auto",
    memory: Memory = None,
    no_serve: Annotated[bool, typer.Option("--no-serve", help="Use the pod without serving layers.")] = False,
    discover: Discover = True,
    as_json: AsJson = False,
) -> None:
    """Run this machine's node in the foreground until Ctrl-C."""
    from node.process import run_node

    home = this_home()
    require_pod(home)
    run_node(
        home, _settings(api, listen, data, advertise, device, memory, discover, serve=not no_serve), as_json
    )


@app.command()
def status(as_json: AsJson = False) -> None:
    """This node, the pod's nodes and what they serve."""
    result: Any = perform("status", {})
    if as_json:
        return show.print_json(result)
    node = result["node"]
    state = f"up at {node['api_url']}" if node["running"] else "not running (say `pod up`)"
    show.out.print(
        f"Pod [bold]{result['pod']['name']}[/]  node [bold]{node['name']}[/] of {node['member']}: {state}"
    )
    show.table(
        ("node", "member", "live", "device", "layers", "address"),
        [
            (
                n["name"],
                n["member"],
                "yes" if n["live"] else "no",
                n["device"],
                _shards_text(n["shards"]),
                n["data_address"],
            )
            for n in result["nodes"]
        ],
    )
    if result["models"]:
        show.out.print()
        _models_table(result["models"])
    return None


@members_app.callback()
def members(context: typer.Context, as_json: AsJson = False) -> None:
    """Who is in the pod, with balances. `pod members remove NAME` removes one."""
    if context.invoked_subcommand is not None:
        return None
    result: Any = perform("members", {})
    if as_json:
        return show.print_json(result)
    show.table(
        ("member", "role", "nodes", "balance", "served tokens", "consumed tokens", "joined"),
        [
            (
                m["name"],
                m["role"],
                ", ".join(m["nodes"]),
                show.credits_text(m["balance_microcredits"]),
                m["num_served_tokens"],
                m["num_consumed_tokens"],
                show.time_text(m["joined_ms"]),
            )
            for m in result["members"]
        ],
        right=frozenset({"balance", "served tokens", "consumed tokens"}),
    )
    return None


@members_app.command("remove")
def members_remove(
    name: Annotated[str, typer.Argument(help="The member's name.")], as_json: AsJson = False
) -> None:
    """Remove a member with all nodes and keys; connected nodes cut it off at once."""
    result = perform("member_remove", {"name": name})
    return show.print_json(result) if as_json else show.out.print(f"{name} is removed.")


def _shards_text(shards: list[Any]) -> str:
    return (
        ", ".join(
            f"{s['model']}[{s['start_layer']}:{s['end_layer']})"
            + ("" if s["ready"] else f" loading {s['percent']}%")
            for s in shards
        )
        or "-"
    )


def _models_table(rows: list[Any]) -> None:
    show.table(
        ("model", "layers", "context", "state", "route"),
        [(m["name"], m["num_layers"], m["max_context_tokens"], m["state"], m["route"] or "-") for m in rows],
        right=frozenset({"layers", "context"}),
    )


@app.command()
def models(as_json: AsJson = False) -> None:
    """The models every node of the pod answers for."""
    result: Any = perform("models", {})
    return show.print_json(result) if as_json else _models_table(result["models"])


@model_app.command("add")
def model_add(
    ref: Annotated[
        str,
        typer.Argument(
            help="smollm2-135m, a Hugging Face id, a directory with config + safetensors, or a .gguf file."
        ),
    ],
    split: Annotated[
        int | None,
        typer.Option(
            "--split", min=1, max=1000, help="Split into at least N stages [default: placement decides]."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")] = "auto",
    name: Annotated[
        str | None, typer.Option("--name", help="The name tools ask for [default: from REF].")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Have the pod serve a model."""
    if Path(ref).expanduser().exists():
        ref = str(Path(ref).expanduser().resolve())
    with show.LoadBars() as bars:
        result = perform("model_add", {"ref": ref, "split": split, "dtype": dtype, "name": name}, bars.update)
    if as_json:
        return show.print_json(result)
    return show.out.print(
        f"The pod serves [bold]{result['name']}[/] ({result['num_layers']} layers) as soon as nodes hold it."
    )


@model_app.command("ls")
def model_ls(as_json: AsJson = False) -> None:
    """The models the pod should serve."""
    models(as_json)


@model_app.command("rm")
def model_rm(name: Annotated[str, typer.Argument(help="The model's name.")], as_json: AsJson = False) -> None:
    """Stop serving a model."""
    result = perform("model_remove", {"name": name})
    return show.print_json(result) if as_json else show.out.print(f"{name} is no longer served.")


@ledger_app.callback()
def ledger(context: typer.Context, as_json: AsJson = False) -> None:
    """Balances (they sum to 0) and recent requests. `pod ledger verify` rechecks everything."""
    if context.invoked_subcommand is not None:
        return None
    result: Any = perform("ledger", {})
    return show.print_json(result) if as_json else print_ledger(result)


def print_ledger(result: Any) -> None:
    show.table(
        ("account", "balance", "served tokens", "consumed tokens"),
        [
            *(
                (
                    a["name"],
                    show.credits_text(a["balance_microcredits"]),
                    a.get("num_served_tokens", ""),
                    a.get("num_consumed_tokens", ""),
                )
                for a in result["accounts"]
            ),
            ("sum", show.credits_text(result["sum_microcredits"]), "", ""),
        ],
        right=frozenset({"balance", "served tokens", "consumed tokens"}),
    )
    if result["recent"]:
        show.out.print()
        show.table(
            ("time", "member", "model", "prompt", "output", "credits", "state"),
            [
                (
                    show.time_text(r["time_ms"]),
                    r["member"],
                    r["model"],
                    r["num_prompt_tokens"],
                    r["num_output_tokens"],
                    show.credits_text(r["amount_microcredits"]),
                    r["state"],
                )
                for r in result["recent"]
            ],
            right=frozenset({"prompt", "output", "credits"}),
        )
    show.out.print(f"\n{result['num_entries']} entries, {result['num_open_holds']} open holds")


@ledger_app.command("verify")
def ledger_verify(as_json: AsJson = False) -> None:
    """Recheck every signature, chain and sum from the raw entries."""
    result: Any = perform("ledger_verify", {})
    if as_json:
        show.print_json(result)
    elif result["ok"]:
        show.out.print(
            f"All {result['num_entries']} entries verify; the sum is {result['sum_microcredits']}."
        )
    else:
        for violation in result["violations"]:
            show.err.print(violation, markup=False)
    if not result["ok"]:
        raise typer.Exit(1)


@key_app.command("create")
def key_create(
    name: Annotated[str, typer.Option("--name", help="What the key is for.")] = "default",
    expires: Annotated[
        str | None,
        typer.Option("--expires", help="How long it is good for: 24h, 90d [default: until revoked]."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key. It is printed once, here, and works at every node of the pod."""
    result = perform(
        "key_create", {"name": name, "expires_s": parse_duration_s(expires) if expires else None}
    )
    if as_json:
        return show.print_json(result)
    show.err.print(f"Key {result['key_id']} ({name}). Shown once:")
    print(result["key"])
    return None


@key_app.command("ls")
def key_ls(as_json: AsJson = False) -> None:
    """This member's keys."""
    result: Any = perform("key_list", {})
    if as_json:
        return show.print_json(result)
    return show.table(
        ("id", "name", "created", "expires", "state"),
        [
            (
                k["key_id"],
                k["name"],
                show.time_text(k["created_ms"]),
                show.time_text(k["expires_ms"]) if k["expires_ms"] else "never",
                k["state"],
            )
            for k in result["keys"]
        ],
    )


@key_app.command("revoke")
def key_revoke(
    key: Annotated[str, typer.Argument(help="The key's id (or its name, when only one has it).")],
    as_json: AsJson = False,
) -> None:
    """Revoke a key at every node."""
    result = perform("key_revoke", {"key": key})
    return show.print_json(result) if as_json else show.out.print(f"Key {result['key_id']} is revoked.")


@app.command()
def chat(
    model: Annotated[
        str | None, typer.Argument(help="The model [default: the pod's first ready one].")
    ] = None,
    message: Annotated[
        str | None,
        typer.Option("--message", "-m", help="Ask this once and exit; else read lines from the terminal."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a model; the answer streams into the terminal."""
    from node.cli.chat import chat as run_chat

    run_chat(model, message, as_json)


@app.command()
def leave(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take this machine out of the pod and stop its node. The journal stays in the state directory."""
    if not yes and sys.stdin.isatty() and not typer.confirm("Take this machine out of the pod?"):
        raise typer.Exit(1)
    result = perform("leave", {})
    return (
        show.print_json(result)
        if as_json
        else show.out.print(f"This machine has left the pod. Its old state is in {result['kept']}.")
    )


@app.command()
def demo(
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=8, help="How many nodes, one member each.")] = 3,
    as_json: AsJson = False,
) -> None:
    """See it work: a pod of local nodes answers a question, with the route, the ledger and the dashboard."""
    from node.demo import run_demo

    run_demo(nodes, as_json)


def _login_name() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "member"


def run() -> None:
    """Entry point: an error a user can act on is one line on stderr (an object with --json), exit 1."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except UserError as error:
        if "--json" in sys.argv:
            show.print_json({"error": {"message": str(error)}})
        print(f"pod: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
