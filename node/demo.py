"""`pod demo`: a pod of local nodes, one member each, as separate processes in a temporary directory.

Everything goes through what a user has: the `pod` command, the OpenAI client and a node's own status. Knows
nothing of how any of it works.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from openai import APIError, DefaultHttpxClient, OpenAI

from node.cli import show
from node.cli.books import print_ledger
from node.errors import UserError
from node.local_pod import LocalNode

MODEL = "smollm2-135m"
QUESTION = "What is the capital of France?"
MEMBERS = ("ada", "ben", "cleo", "dora", "emil", "fay", "gus", "hana")
LOAD_TIMEOUT_S = 180.0


def run_demo(num_nodes: int, as_json: bool) -> None:
    """Run the whole line once; stays up on a terminal until Ctrl-C. Raises UserError when a step fails."""
    sink = show.err if as_json else show.out
    directory = Path(tempfile.mkdtemp(prefix="gpu-pod-demo-"))
    with _stopped_at_end(directory) as nodes:
        _form_pod(nodes, directory, num_nodes, sink)
        split = min(num_nodes, 30)
        nodes[0].pod("model", "add", MODEL, "--split", str(split))
        _wait_for_route(nodes, split)
        asked = nodes[-1] if num_nodes > 1 else nodes[0]
        key = nodes[0].pod("key", "create", "--name", "demo")["key"]
        answer = _ask(asked, key, as_json, sink)
        books = _settled_books(asked)
        verified = asked.pod("ledger", "verify")
        result = answer | {
            "asked_node": asked.member, "ledger_sum_microcredits": books["sum_microcredits"],
            "ledger_verified": verified["ok"], "dashboard_url": f"{asked.api_url}/", "ledger": books,
        }  # fmt: skip
        if as_json:
            show.print_json(result)
        else:
            _show(result, verified)
        if sys.stdin.isatty() and sys.stdout.isatty():
            sink.print("\nThe pod stays up until Ctrl-C.")
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()


@contextlib.contextmanager
def _stopped_at_end(directory: Path) -> Iterator[list[LocalNode]]:
    nodes: list[LocalNode] = []

    def stop_now(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    # A closed terminal window ends the demo's nodes as well.
    previous = {number: signal.signal(number, stop_now) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield nodes
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for node in nodes:
            if node.process is not None and node.process.poll() is None:
                node.process.terminate()
        for node in nodes:
            node.stop()
        shutil.rmtree(directory, ignore_errors=True)


def _form_pod(nodes: list[LocalNode], directory: Path, num_nodes: int, sink: Any) -> None:
    for member in MEMBERS[:num_nodes]:
        home = directory / member
        home.mkdir(mode=0o700)
        nodes.append(LocalNode(member, home))
    first, others = nodes[0], nodes[1:]
    first.pod("create", "demo", "--member", first.member, "--node-name", first.member)
    sink.print(f"[bold]{first.member}[/] created the pod; starting {num_nodes} nodes of {num_nodes} members")
    first.start("up")
    first.wait_until_up()
    for node in others:
        invite = first.pod("invite")["invite"]
        node.start("join", invite, "--member", node.member, "--node-name", node.member)
    for node in others:
        node.wait_until_up()
        sink.print(f"[bold]{node.member}[/] joined with an invite")


def _wait_for_route(nodes: list[LocalNode], num_stages: int) -> None:
    """Until every node sees the model ready in `num_stages` stages; shows how far each shard is."""
    deadline_s = time.monotonic() + LOAD_TIMEOUT_S
    with show.LoadBars() as bars:
        waiting = list(nodes)
        while waiting:
            status = waiting[0].pod("status")
            for entry in status["loading"]:
                bars.update(entry)
            row = next((m for m in status["models"] if m["name"] == MODEL), None)
            if row is not None and row["state"] == "ready" and row["num_stages"] >= num_stages:
                waiting.pop(0)
            elif time.monotonic() > deadline_s:
                state = row["state"] if row is not None else "unknown"
                raise UserError(f"{MODEL} was not ready at {waiting[0].member}'s node in time: {state}")
            else:
                time.sleep(0.3)


def _ask(node: LocalNode, key: str, as_json: bool, sink: Any) -> dict[str, object]:
    sink.print(f"\nAsking [bold]{node.member}[/]'s node at {node.api_url}/v1: {QUESTION}\n")
    client = OpenAI(
        base_url=f"{node.api_url}/v1",
        api_key=key,
        max_retries=0,
        timeout=60.0,
        http_client=DefaultHttpxClient(trust_env=False),
    )
    text, first_token_s, num_output_tokens = "", 0.0, 0
    began_s = time.monotonic()
    echo: TextIO = sys.stderr if as_json else sys.stdout
    try:
        with client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": QUESTION}],
            stream=True,
            temperature=0,
            max_tokens=64,
            stream_options={"include_usage": True},
        ) as stream:
            for chunk in stream:
                for choice in chunk.choices:
                    piece = choice.delta.content or ""
                    if piece and not first_token_s:
                        first_token_s = time.monotonic() - began_s
                    text += piece
                    print(piece, end="", flush=True, file=echo)
                if chunk.usage is not None:
                    num_output_tokens = chunk.usage.completion_tokens
            route = stream.response.headers.get("x-pod-route", "")
    except APIError as error:
        raise UserError(f"the question was not answered: {error.message}") from None
    seconds = time.monotonic() - began_s
    print(file=echo)
    decode_s = max(seconds - first_token_s, 1e-9)
    tokens_per_s = max(num_output_tokens - 1, 0) / decode_s
    return {
        "question": QUESTION, "answer": text, "route": route, "num_output_tokens": num_output_tokens,
        "first_token_s": round(first_token_s, 3), "tokens_per_s": round(tokens_per_s, 1),
    }  # fmt: skip


def _settled_books(node: LocalNode) -> Any:
    """The ledger as the asked node sees it, once the request's hold is resolved."""
    deadline_s = time.monotonic() + 10
    while True:
        books = node.pod("ledger")
        if (books["recent"] and not books["num_open_holds"]) or time.monotonic() > deadline_s:
            return books
        time.sleep(0.1)


def _show(result: dict[str, Any], verified: Any) -> None:
    show.out.print(
        f"\nroute      {result['route']}\nspeed      {result['tokens_per_s']} tokens/s after "
        f"{result['first_token_s']} s to the first token, {result['num_output_tokens']} tokens\n",
        markup=False,
    )
    print_ledger(result["ledger"])
    state = "verifies" if verified["ok"] else "does NOT verify"
    show.out.print(
        f"The ledger {state}: {verified['num_entries']} entries, sum {verified['sum_microcredits']}."
    )
    show.out.print(f"\ndashboard  {result['dashboard_url']}")
