"""The foreground process of a node: logging, signals, the event loop, and what the terminal is told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import logging.handlers
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping

from node.cli import show
from node.database import check_database_url, take_database
from node.errors import UserError
from node.home import PodHome
from node.office import check_name, open_membership, wall_clock_ms
from node.runtime import Listening, NodeRuntime, check_can_start
from node.settings import NodeSettings
from pod.admission import JoinError
from pod.identity import IdentityError
from pod.invite import InviteError
from pod.membership import Membership, MembershipError

LOG_BYTES = 4 * 1024 * 1024
NUM_OLD_LOGS = 3
EXIT_NOW_CODE = 130
LOOK_EVERY_S = 0.2


def join_pod(
    home: PodHome, invite: str, member_name: str, node_name: str, settings: NodeSettings
) -> dict[str, object]:
    """Redeem an invite. Raises UserError with the reason; then nothing has changed, nor is it used."""
    check_name(member_name, "--member")
    check_name(node_name, "--node-name")
    home.check_has_no_pod()
    check_can_start(settings)
    if settings.database is not None:
        check_database_url(settings.database)
    home.acquire_for_new_pod()
    try:
        membership = asyncio.run(Membership.join(home.path, invite, member_name, node_name, wall_clock_ms))
    except (InviteError, JoinError, MembershipError, IdentityError) as error:
        raise UserError(str(error)) from None
    finally:
        home.release()
    roster = membership.roster
    own = roster.members[membership.member_id]
    return {"pod_name": roster.name, "member": own.name, "role": own.role.name.lower()}


def run_node(home: PodHome, settings: NodeSettings, as_json: bool) -> None:
    """Run until a signal; a second one ends the process at once. Raises UserError."""
    home.acquire()
    try:
        _log_to(home)
        if settings.database is not None:
            take_database(home, open_membership(home).pod, settings.database)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_run(home, settings, as_json))
    finally:
        home.release()


async def _run(home: PodHome, settings: NodeSettings, as_json: bool) -> None:
    while await _run_once(home, settings, as_json):
        logging.getLogger(__name__).warning("this node goes on under a new key, with a journal of its own")


async def _run_once(home: PodHome, settings: NodeSettings, as_json: bool) -> bool:
    """Whether the node is to start again."""
    runtime = NodeRuntime(home, settings)
    loop = asyncio.get_running_loop()

    def end() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, os._exit, EXIT_NOW_CODE)
        runtime.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    shown = loop.create_task(show_loading(runtime.loading)) if show.err.is_terminal and not as_json else None
    try:
        await runtime.run(lambda listening: _report_to_terminal(listening, as_json))
    finally:
        if shown is not None:
            shown.cancel()
    return runtime.must_restart


async def show_loading(loading: Callable[[], Iterable[Mapping[str, object]]]) -> None:
    """Bars while shards load, whenever they do, until it is cancelled."""
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        if not list(loading()):
            continue
        with show.LoadBars(is_transient=True) as bars:
            while now := list(loading()):
                for progress in now:
                    bars.update(progress)
                await asyncio.sleep(LOOK_EVERY_S)


def _report_to_terminal(listening: Listening, as_json: bool) -> None:
    # Nobody may be reading any more; the node goes on.
    with contextlib.suppress(BrokenPipeError):
        _report(listening, as_json)


def _report(listening: Listening, as_json: bool) -> None:
    url = listening.running.api_url
    if as_json:
        show.print_json(
            {
                "api_url": url,
                "openai_base_url": f"{url}/v1",
                "dashboard_url": f"{url}/",
                "control_addresses": list(listening.control_addresses),
            }
        )
        return
    show.out.print(f"OpenAI API  {url}/v1\nDashboard   {url}/")
    if listening.is_under_pod:
        show.out.print("Clients check the certificate with what `pod ca` prints.")
    show.out.print("Ctrl-C stops the node.")


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.Loop


def _log_to(home: PodHome) -> None:
    """Everything worth keeping goes to node.log; warnings also to the terminal, in one line each."""
    file = logging.handlers.RotatingFileHandler(home.log_file, maxBytes=LOG_BYTES, backupCount=NUM_OLD_LOGS)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    terminal.setFormatter(_OneLine("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[file, terminal], force=True)
    for noisy in ("libp2p", "multiaddr", "zeroconf", "alembic", "httpx", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


class _OneLine(logging.Formatter):
    """Tracebacks belong in the log file."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {record.getMessage()}"
