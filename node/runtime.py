"""One running node, put together: who is started in which order, who tells whom, and how all of it ends.

Every long-lived task is owned here. What the parts do is their own business; this file only joins them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ledger.journal import JournalError
from ledger.ledger import LedgerError
from ledger.rate_card import RateCard
from node.catalogue import BUNDLE_KIND, Catalogue
from node.changes import Changes
from node.claims import Claims
from node.disputes import Disputes
from node.engine.client import (
    EngineClient,
    EngineConfig,
    EngineError,
    EngineEvent,
    EngineExited,
    EngineRestarted,
)
from node.engine.events import ReceiptHeld, WorkDisputed
from node.engine.messages import EngineReady, MemberStanding
from node.errors import UserError
from node.gateway.app import create_app
from node.gateway.serve import ListenError, bind, serving
from node.home import PodHome, RunningNode
from node.journal_guard import JournalGuard, Verdict
from node.ledger_channel import LedgerChannel
from node.links.frames import MAX_NUM_DRAFT_TOKENS
from node.links.head_links import HeadLinks
from node.local_api import local_router
from node.node_backend import NodeBackend
from node.office import Office, begin_books, is_ledger_old, open_ledger, open_membership, wall_clock_ms
from node.operations import run_operation
from node.plan_book import PlanBook
from node.planner import Planner
from node.pod_state import PodState
from node.serving import Serving
from node.sessions.head import Head
from node.settings import NodeSettings, split_address
from node.standings import Standings
from node.status import NodeStatus
from node.tls.authority import Authority
from node.tls.front_door import FrontDoor
from node.tls.given_certificate import GivenCertificate
from pod.address import AddressError, dialable, host_port_of, multiaddr_of
from pod.control import ControlError
from pod.roster.events import EventError, Role
from pod.roster.roster import Roster

log = logging.getLogger(__name__)

ADVERTISE_DEBOUNCE_S = 0.2
STANDINGS_DEBOUNCE_S = 1.0
FILES_CHECK_EVERY_S = 5.0
CLAIMS_CHECK_EVERY_S = 30.0
ENGINE_RETRY_S = 30.0
SHUTDOWN_GRACE_S = 10
LEAVE_ANSWER_S = 0.5


@dataclass(frozen=True, slots=True)
class Listening:
    """What `pod up` reports once the node answers. `is_under_pod`: HTTPS with a certificate that clients only
    take when they trust the pod's authority.
    """

    running: RunningNode
    control_addresses: tuple[str, ...]
    is_under_pod: bool = False


class NodeRuntime:
    """`run` until `stop` is called; then everything is closed in order. Used once."""

    def __init__(self, home: PodHome, settings: NodeSettings) -> None:
        self._home = home
        self._settings = settings
        self._stopped = asyncio.Event()
        self._failure: str | None = None
        # After `run`: this node has a new key, and is to be made anew.
        self.must_restart = False
        self._aside: Path | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._changes = Changes()
        self._status_due = asyncio.Event()
        self._files_due = asyncio.Event()
        self._standings_due = asyncio.Event()
        self._running: RunningNode | None = None
        self._engine: EngineClient | None = None
        # Set before it is ready: a node that is told to stop while it starts must leave no engine behind.
        self._engine_to_stop: EngineClient | None = None
        self._serving: Serving | None = None
        self._door: FrontDoor | None = None
        self._engine_ready: EngineReady | None = None
        self._engine_problem = ""
        self._told_cards: tuple[RateCard, ...] = ()
        self._make_parts()

    def _make_parts(self) -> None:
        settings = self._settings
        self._membership = open_membership(self._home)
        self._check_still_in_pod()
        # Guests use the pod; they serve nothing.
        self._serves = settings.serve and self._membership.role is not Role.GUEST
        self._ledger = open_ledger(self._home, self._membership)
        node = self._membership.node_id
        self._catalogue = Catalogue(
            self._home.models_dir, self._serves, self._membership.request, self._membership.live
        )
        self._state = PodState(
            node=node,
            roster=lambda: self._membership.roster,
            adverts=lambda: {node: advert.body for node, advert in self._membership.adverts().items()},
            live=self._membership.live,
            catalogue=self._catalogue,
        )
        self._book = PlanBook(self._home.plan_file, self._may_plan, self._plan_changed)
        self._state.plan_book = self._book
        self._planner = Planner(node, self._state, self._book, self._membership.node_key.sign)
        self._standings = Standings(node, self._ledger, lambda: self._membership.roster, wall_clock_ms)
        self._links = HeadLinks(self._membership.node_key, self._membership.pod)
        self._head = Head(
            pod=self._membership.pod,
            node=node,
            sign=self._membership.node_key.sign,
            links=self._links,
            ledger=self._ledger,
            find_route=self._state.find_route,
            clock_ms=wall_clock_ms,
            max_num_draft_tokens=MAX_NUM_DRAFT_TOKENS if self._settings.speculation else 0,
            weight_of=self._standings.weight_of,
            own_member=self._standings.own_member,
            check_credit=self._standings.check_credit,
        )
        self._guard = JournalGuard(
            self._membership,
            self._ledger,
            is_ledger_old(self._home, self._membership, self._ledger.ledger),
        )
        self._claims = Claims(self._ledger)
        self._authority = Authority(self._membership, self._home.keys_dir, wall_clock_ms)
        self._disputes = Disputes(node, self._ledger)
        self._office = Office(
            home=self._home,
            membership=self._membership,
            ledger=self._ledger,
            catalogue=self._catalogue,
            state=self._state,
            loading=self.loading,
            leave=self._leave,
        )

    def _check_still_in_pod(self) -> None:
        if self._membership.node_id not in self._membership.roster.nodes:
            raise UserError("this machine was removed from the pod; `pod leave`, then join with a new invite")

    def stop(self, failure: str | None = None) -> None:
        """End the node. With `failure`, `run` raises it as a UserError once everything is closed."""
        self._failure = self._failure or failure
        self._stopped.set()

    def loading(self) -> Iterable[Mapping[str, object]]:
        """The shards that load now, for progress bars."""
        return self._serving.loading() if self._serving else ()

    async def run(self, on_listening: Callable[[Listening], None]) -> None:
        """Raises UserError: a port is taken, the engine cannot start, this node was removed."""
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._ledger.close)
            listener = self._bind_ports()
            stack.callback(listener.close)
            await stack.enter_async_context(self._membership_running())
            stack.push_async_callback(self._links.close)
            self._wire()
            if not await self._may_go_on():
                return
            await self._recover()
            stack.push_async_callback(self._stop_engine)
            stack.push_async_callback(self._end_tasks)
            stack.push_async_callback(self._head.close, SHUTDOWN_GRACE_S)
            door = self._open_door(listener)
            stack.callback(door.close)
            backend = self._backend()
            self._membership.on_roster_change(backend.roster_changed)
            app = create_app(backend, is_strict=door.is_strict)
            app.include_router(local_router(self._run_operation, lambda: self._local_token))
            self._running = self._home.announce_running(door.api_url, door.local_url)
            self._office.running = self._running
            tls = door.certificate.context if door.certificate is not None else None
            await stack.enter_async_context(
                serving(app, listener, tls=tls, plain=door.plain, grace_s=SHUTDOWN_GRACE_S)
            )
            self._start_tasks()
            is_under_pod = door.certificate is not None and not door.is_strict()
            on_listening(Listening(self._running, self._membership.addresses(), is_under_pod))
            await self._stopped.wait()
        if self._aside is not None:
            self._home.set_aside(self._aside)
        if self._failure is not None:
            raise UserError(self._failure)

    async def _may_go_on(self) -> bool:
        """Whether this node may write in its journal. If not it has a new key then, or was told to stop."""
        deciding = asyncio.ensure_future(self._decide())
        stopping = asyncio.ensure_future(self._stopped.wait())
        await asyncio.wait({deciding, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if deciding.done():
            return deciding.result()
        deciding.cancel()
        await asyncio.wait({deciding})
        if self._failure is not None:
            raise UserError(self._failure)
        return False

    async def _decide(self) -> bool:
        if await self._guard.decide() is Verdict.RENEW:
            await self._guard.renew(self._home)
            self.must_restart = True
            return False
        self._guard.retire_old_key(self._home)
        try:
            await self._ledger.run(lambda ledger: begin_books(self._membership, ledger))
        except (LedgerError, JournalError) as error:
            raise UserError(str(error)) from None
        return True

    async def _recover(self) -> None:
        try:
            num_voided = await self._head.recover()
        except (LedgerError, JournalError) as error:
            raise UserError(f"the holds of an earlier run cannot be voided: {error}") from None
        if num_voided:
            log.info("%d holds of an earlier run were voided", num_voided)

    # Parts.

    def _backend(self) -> NodeBackend:
        return NodeBackend(
            node=self._membership.node_id,
            state=self._state,
            catalogue=self._catalogue,
            head=self._head,
            ledger=self._ledger,
            changes=self._changes,
            local_token=lambda: self._local_token,
            clock_ms=wall_clock_ms,
        )

    @property
    def _local_token(self) -> str:
        return self._running.local_token if self._running is not None else ""

    async def _run_operation(
        self, name: str, arguments: Mapping[str, object], tell: Callable[[Mapping[str, object]], None]
    ) -> object:
        return await run_operation(self._office, name, arguments, tell)

    def _bind_ports(self) -> socket.socket:
        """Take the API port, and see that the others are free, before anything else begins."""
        check_can_start(replace(self._settings, serve=self._serves))
        return _bind(self._settings.api_address, "--api")

    def _open_door(self, listener: socket.socket) -> FrontDoor:
        """The owner's node makes the pod's authority first, if there is none."""
        try:
            self._authority.ensure()
        except (OSError, EventError) as error:
            raise UserError(f"the pod's authority for HTTPS cannot be made: {error}") from None
        try:
            self._door = FrontDoor(
                self._settings,
                listener,
                self._authority,
                self._home.keys_dir,
                self._membership.roster.name,
                wall_clock_ms,
            )
        except ListenError as error:
            raise UserError(str(error)) from None
        self._office.https = self._door.describe
        return self._door

    @contextlib.asynccontextmanager
    async def _membership_running(self) -> AsyncIterator[None]:
        membership, settings = self._membership, self._settings
        channel = LedgerChannel(self._ledger, self._entries_came)
        channel.on_fork = self._author_froze
        membership.add_replicated(channel)
        membership.add_replicated(self._book)
        membership.handle(BUNDLE_KIND, self._catalogue.answer_bundle)
        self._authority.handle_requests()
        self._guard.handle_requests()
        announce = []
        port = split_address(settings.listen_address, "--listen")[1]
        if settings.advertise_listen:
            announce = [settings.advertise_listen]
        elif settings.advertise_host and port:
            announce = [f"{settings.advertise_host}:{port}"]
        try:
            await membership.start([settings.listen_address], announce, settings.discover)
        except (ControlError, AddressError) as error:
            raise UserError(str(error)) from None
        try:
            yield
        finally:
            await membership.stop()

    def _wire(self) -> None:
        membership = self._membership
        membership.on_roster_change(self._roster_changed)
        membership.on_peer(self._peer_changed)
        membership.on_adverts(self._adverts_changed)
        membership.on_self_removed(lambda: self.stop("this machine was removed from the pod"))
        membership.on_duplicate(
            lambda: self.stop("another machine runs with a copy of this state directory; one must go")
        )
        self._ledger.on_append = self._ledger_changed
        self._roster_changed(membership.roster)

    # Who tells whom.

    def _roster_changed(self, roster: Roster) -> None:
        self._catalogue.set_deployed(roster.models)
        self._state.frozen = self._ledger.ledger.frozen_authors()
        self._links.set_trust(self._trusted())
        if self._engine is not None:
            self._spawn(self._trust_engine(self._engine, self._trusted()))
            if (cards := self._state.recent_rate_cards()) != self._told_cards:
                self._spawn(self._tell_rate_cards(self._engine, cards))
        self._files_due.set()
        self._status_due.set()
        self._wake_door()
        self._wake()

    def _author_froze(self) -> None:
        if self._ledger.ledger.is_frozen(self._membership.node_id):
            log.error("this node's key signed two histories; it starts again under a new one")
            self.must_restart = True
            self._stopped.set()
        self._roster_changed(self._membership.roster)

    def _trusted(self) -> tuple[bytes, ...]:
        """Certificates of those who may open sessions here and serve ours: the roster's, but for nodes that
        signed two histories, or that sign here without a hold to pay from.
        """
        nodes = self._membership.roster.nodes.values()
        without = (self._state.frozen | self._claims.unpaying_heads) - {self._membership.node_id}
        return tuple(node.certificate_der for node in nodes if node.id not in without)

    def _peer_changed(self, _node: bytes, _live: bool) -> None:
        self._wake_door()
        self._wake()

    def _wake_door(self) -> None:
        if self._door is not None:
            self._door.wake()

    def _adverts_changed(self) -> None:
        self._wake()

    def _plan_changed(self) -> None:
        self._membership.changed()
        self._wake()

    def _ledger_changed(self) -> None:
        self._membership.changed()
        self._entries_came()

    def _entries_came(self) -> None:
        self._standings_due.set()
        self._changes.tell()

    def _shards_changed(self) -> None:
        self._status_due.set()
        self._wake()

    def _wake(self) -> None:
        self._state.changed()
        self._planner.wake()
        if self._serving is not None:
            self._serving.wake()
        self._changes.tell()

    def _may_plan(self, node: bytes) -> bool:
        roster = self._membership.roster
        member = roster.member_of_node(node)
        return member is not None and roster.members[member].role is not Role.GUEST

    def _engine_event(self, event: EngineEvent) -> None:
        match event:
            case ReceiptHeld(receipt=receipt):
                self._claims.hold(receipt)
            case WorkDisputed():
                self._spawn(self._dispute(event))
            case EngineExited(reason=reason):
                log.warning("%s; it is being restarted", reason)
                self._engine_ready = None
                self._status_due.set()
                if self._serving is not None:
                    self._serving.engine_exited()
            case EngineRestarted(ready=ready, shards=shards, failed=failed):
                self._engine_ready = ready
                for reason in failed:
                    log.warning("after the engine's restart: %s", reason)
                if self._serving is not None:
                    self._serving.engine_restarted(shards)
            case _:
                pass

    async def _dispute(self, event: WorkDisputed) -> None:
        await self._disputes.record(event)

    # Tasks.

    def _start_tasks(self) -> None:
        self._spawn(self._planner.run())
        self._spawn(self._advertise())
        self._spawn(self._find_files())
        if self._door is not None:
            self._spawn(self._door.keep())
        self._spawn(self._keep_standings())
        if self._serves:
            self._spawn(self._serve())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a part of the node failed", exc_info=error)
            self.stop(f"the node failed: {error} (see {self._home.log_file})")

    async def _end_tasks(self) -> None:
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _advertise(self) -> None:
        """Say what this node offers whenever that changed, several changes at once."""
        said = b""
        while True:
            self._status_due.clear()
            status = self._status().encode()
            if status != said:
                self._membership.publish_advert(status)
                said = status
                self._wake()
            await self._status_due.wait()
            await asyncio.sleep(ADVERTISE_DEBOUNCE_S)

    def _status(self) -> NodeStatus:
        ready = self._engine_ready
        entries = self._catalogue.entries()
        problems = [(e.deployed.id, e.problem[:200]) for e in entries if e.problem]
        failed = {model for model, _ in self._serving.problems()} if self._serving is not None else set()
        if self._engine_problem:
            problems.append((bytes(32), self._engine_problem[:200]))
        if self._serving is not None:
            problems += self._serving.problems()
        return NodeStatus(
            serving=ready is not None,
            starting=self._serves and (ready is None or not self._catalogue.has_looked),
            device=ready.device if ready else "",
            memory_bytes=ready.memory_bytes if ready else 0,
            bytes_per_second=ready.bytes_per_second if ready else 0,
            data_address=self._data_address(ready) if ready else "",
            api_url=self._running.api_url if self._running else "",
            software=version("gpu-pod"),
            shards=self._serving.shards() if self._serving else (),
            # A model that failed to load here is for others, if they can.
            models_available=tuple(
                e.deployed.id for e in entries if e.weights is not None and e.deployed.id not in failed
            ),
            problems=tuple(problems),
            speeds=self._serving.speeds() if self._serving else (),
            link_rtt_us=self._state.link_rtt_us(),
        )

    def _data_address(self, ready: EngineReady) -> str:
        """Where other machines dial the stage links."""
        host, _, port = ready.data_address.rpartition(":")
        if self._settings.advertise_data:
            return self._settings.advertise_data
        if self._settings.advertise_host:
            return f"{self._settings.advertise_host}:{port}"
        found = dialable([multiaddr_of(f"{host}:{port}")])
        return f"{_url_host(host_port_of(found[0])[0])}:{port}" if found else ready.data_address

    async def _find_files(self) -> None:
        """Look for the files of models whenever the roster changed, and again for what is missing."""
        while True:
            self._files_due.clear()
            if await self._catalogue.look_for_files():
                self._status_due.set()
                self._wake()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._files_due.wait(), FILES_CHECK_EVERY_S)

    async def _serve(self) -> None:
        engine = self._engine_to_stop = EngineClient(self._engine_config(), self._engine_event)
        while True:
            try:
                self._engine_ready = await engine.start()
                break
            except EngineError as error:
                self._engine_problem = str(error)
                log.warning("this machine serves nothing: %s", error)
                self._status_due.set()
                await asyncio.sleep(ENGINE_RETRY_S)
        self._engine, self._engine_problem = engine, ""
        await self._trust_engine(engine, self._trusted())
        await self._tell_rate_cards(engine, self._state.recent_rate_cards())
        self._serving = Serving(
            self._membership.node_id, engine, self._catalogue, self._state, self._book, self._shards_changed
        )
        self._status_due.set()
        self._spawn(self._check_claims())
        await self._serving.run()

    def _engine_config(self) -> EngineConfig:
        return EngineConfig(
            node_key_path=self._home.keys_dir / "node.pem",
            pod=self._membership.pod,
            data_listen=self._settings.data_address,
            device=self._settings.device,
            memory_bytes=self._settings.memory_bytes,
            log_path=self._home.path / "engine.log",
            compile_dir=self._home.path / "compiled" if self._settings.compile else None,
            hidden_bits=self._settings.hidden_bits,
            max_num_sessions=self._settings.max_num_sessions,
        )

    async def _keep_standings(self) -> None:
        """Weigh the members anew whenever balances changed, several changes at once."""
        said: tuple[MemberStanding, ...] = ()
        while True:
            self._standings_due.clear()
            standings = await self._standings.refresh()
            if self._engine is not None and standings != said:
                with contextlib.suppress(EngineError):
                    await self._engine.set_standings(standings)
                    said = standings
            await asyncio.sleep(STANDINGS_DEBOUNCE_S)
            await self._standings_due.wait()

    async def _trust_engine(self, engine: EngineClient, certificates: tuple[bytes, ...]) -> None:
        try:
            # First, so that who may come is never a stranger to the queue.
            await engine.set_standings(await self._standings.refresh())
            await engine.set_trust(certificates)
        except EngineError as error:
            # A restarting engine is given the newest certificates when it is back.
            log.info("the engine was not told who is in the roster: %s", error)

    async def _tell_rate_cards(self, engine: EngineClient, cards: tuple[RateCard, ...]) -> None:
        """The one in force last."""
        self._told_cards = cards
        for card in cards:
            try:
                await engine.set_rate_card(card.encode())
            except EngineError as error:
                # A restarting engine is told when it is back.
                log.info("the engine was not told of rate card %s: %s", card.name, error)

    async def _check_claims(self) -> None:
        while True:
            await asyncio.sleep(CLAIMS_CHECK_EVERY_S)
            before = self._claims.unpaying_heads
            await self._claims.check()
            if self._claims.unpaying_heads != before:
                log.warning(
                    "%d nodes sign without a hold; no work for them", len(self._claims.unpaying_heads)
                )
                self._roster_changed(self._membership.roster)

    async def _stop_engine(self) -> None:
        if self._engine_to_stop is not None:
            await self._engine_to_stop.stop()

    async def _leave(self) -> Path:
        """Tell the others, answer the command, then stop and set the state aside."""
        if self._membership.role is not Role.OWNER:
            await self._membership.leave()
        self._aside = self._home.aside_dir()
        self._failure = None
        asyncio.get_running_loop().call_later(LEAVE_ANSWER_S, self._stopped.set)
        return self._aside


def check_can_start(settings: NodeSettings) -> None:
    """Ports are free and the certificate is usable, or UserError that names the option to change."""
    if settings.tls_cert is not None and settings.tls_key is not None:
        GivenCertificate(settings.tls_cert, settings.tls_key, wall_clock_ms).start()
    addresses = {"--api": settings.api_address, "--listen": settings.listen_address}
    if settings.serve:
        addresses["--data"] = settings.data_address
    for option, address in addresses.items():
        _bind(address, option).close()


def _bind(address: str, option: str) -> socket.socket:
    host, port = split_address(address, option)
    try:
        return bind(host, port, option)
    except ListenError as error:
        raise UserError(str(error)) from None


def _url_host(host: str) -> str:
    if host in ("", "0.0.0.0"):  # noqa: S104 - compared, not bound
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
