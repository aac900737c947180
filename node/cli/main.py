"""The command line: the `pod` program and its top-level commands. Each calls one operation and shows it."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from node.cli import show
from node.cli.authority import ca, https_text
from node.cli.backup import backup, restore
from node.cli.books import ledger_app
from node.cli.call import Json, perform, require_pod, this_home, wait_until_stopped
from node.cli.keys import key_app
from node.cli.members import members_app
from node.cli.models import model_app, models, models_table
from node.cli.options import (
    Advertise,
    AdvertiseData,
    AdvertiseListen,
    Api,
    AsJson,
    Compile,
    Data,
    Database,
    DeviceOption,
    Discover,
    HiddenBits,
    InsecureHttp,
    Listen,
    MaxSessions,
    MemberName,
    Memory,
    NodeName,
    NoServe,
    Speculation,
    TlsCert,
    TlsKey,
    node_settings,
)
from node.cli.times import times_tables
from node.cli.treasury import transfer, treasury_app
from node.errors import UserError
from node.settings import (
    DEFAULT_API_ADDRESS,
    DEFAULT_DATA_ADDRESS,
    DEFAULT_LISTEN_ADDRESS,
    parse_duration_s,
)

app = typer.Typer(
    name="pod",
    help="A private pool of GPUs for a team. Start with `pod create NAME`, or `pod demo` to see it work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(model_app, name="model")
app.add_typer(key_app, name="key")
app.add_typer(members_app, name="members")
app.add_typer(ledger_app, name="ledger")
app.add_typer(treasury_app, name="treasury")
# A negative amount is refused in our words, not taken for an option.
app.command("transfer", context_settings={"ignore_unknown_options": True})(transfer)
app.command("models")(models)
app.command("backup")(backup)
app.command("restore")(restore)
app.command("ca")(ca)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="The pod's name.")],
    member: MemberName = None,
    node_name: NodeName = None,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Create a pod: this machine becomes its first node, you its owner."""
    from node.office import create_pod, machine_name

    result = create_pod(this_home(), name, member or _login_name(), node_name or machine_name(), database)
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
    invite: Annotated[
        str,
        typer.Argument(
            envvar="POD_INVITE",
            help="What `pod invite` printed; the variable keeps it out of the process list.",
        ),
    ],
    member: MemberName = None,
    no_serve: NoServe = False,
    node_name: NodeName = None,
    api: Api = DEFAULT_API_ADDRESS,
    listen: Listen = DEFAULT_LISTEN_ADDRESS,
    data: Data = DEFAULT_DATA_ADDRESS,
    advertise: Advertise = None,
    advertise_listen: AdvertiseListen = None,
    advertise_data: AdvertiseData = None,
    hidden_bits: HiddenBits = "16",
    device: DeviceOption = "auto",
    memory: Memory = None,
    discover: Discover = True,
    compile_layers: Compile = True,
    speculation: Speculation = True,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    insecure_http: InsecureHttp = False,
    database: Database = None,
    max_sessions: MaxSessions = None,
    as_json: AsJson = False,
) -> None:
    """Join a pod with an invite, then run this machine's node in the foreground."""
    from node.office import machine_name
    from node.process import join_pod, run_node

    settings = node_settings(
        api,
        listen,
        data,
        advertise,
        device,
        memory,
        discover,
        not no_serve,
        advertise_listen,
        advertise_data,
        compile_layers,
        speculation,
        hidden_bits,
        tls_cert,
        tls_key,
        insecure_http,
        database,
        max_sessions,
    )
    home = this_home()
    result = join_pod(home, invite, member or _login_name(), node_name or machine_name(), settings)
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
    advertise_listen: AdvertiseListen = None,
    advertise_data: AdvertiseData = None,
    hidden_bits: HiddenBits = "16",
    device: DeviceOption = "auto",
    memory: Memory = None,
    no_serve: NoServe = False,
    discover: Discover = True,
    compile_layers: Compile = True,
    speculation: Speculation = True,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    insecure_http: InsecureHttp = False,
    database: Database = None,
    max_sessions: MaxSessions = None,
    as_json: AsJson = False,
) -> None:
    """Run this machine's node in the foreground until Ctrl-C."""
    from node.process import run_node

    home = this_home()
    require_pod(home)
    settings = node_settings(
        api,
        listen,
        data,
        advertise,
        device,
        memory,
        discover,
        not no_serve,
        advertise_listen,
        advertise_data,
        compile_layers,
        speculation,
        hidden_bits,
        tls_cert,
        tls_key,
        insecure_http,
        database,
        max_sessions,
    )
    run_node(home, settings, as_json)


@app.command()
def status(as_json: AsJson = False) -> None:
    """This node, the pod's nodes and what they serve."""
    result: Any = perform("status", {})
    if as_json:
        return show.print_json(result)
    node = result["node"]
    state = f"up at {node['api_url']}" if node["running"] else "not running (say `pod up`)"
    if not node["is_in_pod"]:
        state = "removed from the pod (say `pod leave`, then join with a new invite)"
    show.out.print(
        f"Pod [bold]{result['pod']['name']}[/]  node [bold]{node['name']}[/] of {node['member']}: {state}"
    )
    if node["https"]:
        show.out.print(https_text(node["https"], result["pod"]["authority_sha256"]), markup=False)
    show.table(
        ("node", "member", "live", "device", "layers", "address"),
        [
            (
                n["name"],
                n["member"],
                "?" if not node["running"] else "yes" if n["live"] else "no",
                n["device"],
                _shards_text(n["shards"]),
                n["data_address"],
            )
            for n in result["nodes"]
        ],
    )
    if result["models"]:
        show.out.print()
        models_table(result["models"])
        times_tables(result["models"])
    return None


def _shards_text(shards: list[Any]) -> str:
    return (
        ", ".join(
            f"{s['model']}[{s['start_layer']}:{s['end_layer']})"
            + ("" if s["ready"] else f" loading {s['percent']}%")
            for s in shards
        )
        or "-"
    )


@app.command()
def chat(
    model: Annotated[
        str | None, typer.Argument(help="The model (default: the pod's first ready one).")
    ] = None,
    message: Annotated[
        str | None,
        typer.Option("--message", "-m", help="Ask this once and exit; else read lines from the terminal."),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, max=2, help="0 always takes the likeliest token.")
    ] = 0.7,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens of one answer.")] = 1024,
    as_json: AsJson = False,
) -> None:
    """Talk to a model; the answer streams into the terminal."""
    from node.cli.chat import ChatOptions
    from node.cli.chat import chat as run_chat

    run_chat(model, message, ChatOptions(temperature, max_tokens, as_json))


@app.command()
def leave(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take this machine out of the pod and stop its node. The journal stays in the state directory."""
    if not yes and sys.stdin.isatty() and not typer.confirm("Take this machine out of the pod?"):
        raise typer.Exit(1)
    result = perform("leave", {})
    wait_until_stopped()
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


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        show.out.print(f"gpu-pod {version('gpu-pod')}")
        raise typer.Exit


@app.callback()
def pod(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A private pool of GPUs for a team. Start with `pod create NAME`, or `pod demo` to see it work."""


def _login_name() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "member"


def run() -> None:
    """Entry point: an error a user can act on is one line on stderr (an object with --json), exit 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except UserError as error:
        if "--json" in sys.argv:
            show.print_json({"error": {"message": str(error)}})
        print(f"pod: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # Whoever read our output (`pod ledger | head`) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
