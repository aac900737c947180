"""What the operations of the command line work on: membership, ledger, catalogue and the state of the pod.

A running node makes its own with `running` set; `open_offline` serves commands while no node runs.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ledger.entry import AccountOpened, Issued
from ledger.journal import JournalError
from ledger.ledger import Ledger, LedgerError
from ledger.rate_card import MICROCREDITS_PER_CREDIT
from node.catalogue import Catalogue
from node.database import check_database_url
from node.errors import UserError
from node.home import PodHome, RunningNode
from node.ledger_thread import LedgerThread
from node.pod_state import PodState
from node.policy import rate_card_of
from node.roster_directory import RosterDirectory
from pod.address import dialable, multiaddr_of
from pod.identity import IdentityError
from pod.membership import Membership, MembershipError
from pod.roster.apply import RosterError
from pod.roster.events import EventError

# What the treasury starts with: starter grants for a thousand members.
INITIAL_ISSUE_MICROCREDITS = 1_000_000 * MICROCREDITS_PER_CREDIT

Leave = Callable[[], Awaitable[Path]]
"""Tell the pod, stop the node, set the state aside; returns where the state will be."""


def wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class Office:
    """`running` is None while the node does not run; `loading` yields shards on their way in; `https` tells
    of the certificate of the API, None when it has none.
    """

    home: PodHome
    membership: Membership
    ledger: LedgerThread
    catalogue: Catalogue
    state: PodState
    running: RunningNode | None = None
    loading: Callable[[], Iterable[Mapping[str, object]]] = tuple
    leave: Leave | None = None
    https: Callable[[], Mapping[str, object] | None] = lambda: None

    def invite_addresses(self, listen: tuple[str, int], advertise_host: str | None) -> tuple[str, ...]:
        """What an invite should name beyond what the node has announced by itself."""
        if self.running is not None:
            return ()
        host, port = listen
        if advertise_host and port:
            return (f"{advertise_host}:{port}",)
        if self.membership.addresses() or not port:
            return ()
        return tuple(dialable([multiaddr_of(f"{host}:{port}")]))

    def close(self) -> None:
        self.ledger.close()


def open_membership(home: PodHome) -> Membership:
    try:
        return Membership.open(home.path, wall_clock_ms)
    except (MembershipError, IdentityError, RosterError, EventError) as error:
        raise UserError(str(error)) from None


def open_ledger(home: PodHome, membership: Membership) -> LedgerThread:
    """Writes nothing. Raises UserError."""
    directory = RosterDirectory(lambda: membership.roster)
    try:
        ledger = Ledger.open(
            home.ledger_url,
            membership.pod,
            directory,
            membership.node_id,
            membership.node_key.sign,
            wall_clock_ms,
        )
    except JournalError as error:
        raise UserError(f"the ledger cannot be opened: {error}") from None
    return LedgerThread(ledger)


def is_ledger_old(home: PodHome, membership: Membership, ledger: Ledger) -> bool:
    """Whether what this node wrote before is known to be missing here: restored from a backup, or lost.

    A plan is only ever kept after the ledger was begun.
    """
    is_lost = ledger.num_entries() == 0 and home.plan_file.exists() and not home.retired_nodes()
    return home.is_restored or (is_lost and len(membership.roster.nodes) > 1)


def begin_books(membership: Membership, ledger: Ledger) -> None:
    """This member's account and, in a pod that has just been made, the first credit.

    Only for a node that may go on with its journal (`journal_guard.py`). Raises LedgerError or JournalError.
    """
    roster = membership.roster
    if membership.node_id not in roster.nodes:
        return
    is_new = len(roster.nodes) + len(roster.former_nodes) == 1
    if is_new and roster.owner.id == membership.member_id and ledger.num_entries() == 0:
        ledger.append(Issued(INITIAL_ISSUE_MICROCREDITS))
    if not ledger.is_account_open(membership.member_id):
        ledger.append(AccountOpened(membership.member_id, rate_card_of(roster).version))


def open_offline(home: PodHome) -> Office:
    """Raises UserError. The home must be locked by the caller."""
    membership = open_membership(home)
    catalogue = Catalogue(home.models_dir, False, membership.request, tuple)
    catalogue.set_deployed(membership.roster.models)
    state = PodState(
        node=membership.node_id,
        roster=lambda: membership.roster,
        adverts=dict,
        live=frozenset,
        catalogue=catalogue,
    )
    return Office(home, membership, open_ledger(home, membership), catalogue, state)


def create_pod(
    home: PodHome, pod_name: str, member_name: str, node_name: str, database: str | None = None
) -> dict[str, object]:
    """A new pod in this state directory. Raises UserError and then has changed nothing."""
    check_name(pod_name, "the pod's name")
    check_name(member_name, "--member")
    check_name(node_name, "--node-name")
    home.acquire_for_new_pod()
    try:
        if database is not None:
            check_database_url(database)
            home.remember_database(database)
        membership = Membership.create_pod(home.path, pod_name, member_name, node_name, wall_clock_ms)
        with closing(open_ledger(home, membership)) as thread:
            begin_books(membership, thread.ledger)
    except (MembershipError, IdentityError) as error:
        raise UserError(str(error)) from None
    except (OSError, UserError, LedgerError, JournalError) as error:
        home.forget_pod()
        raise UserError(f"the pod could not be written to {home.path}: {error}") from None
    finally:
        home.release()
    return {
        "pod": membership.pod.hex(),
        "pod_name": pod_name,
        "member": member_name,
        "node": membership.node_id.hex(),
        "home": str(home.path),
    }


def check_name(name: str, what: str) -> None:
    if not 0 < len(name) <= 64 or not name.isprintable() or name != name.strip():
        raise UserError(f"{what} must be 1 to 64 printable characters (got {name!r})")


def machine_name() -> str:
    """The host's name, for people to tell nodes apart."""
    return socket.gethostname().split(".")[0][:40] or "node"
