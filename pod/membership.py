"""Membership of one node in one pod: the facade the rest of gpu-pod uses. It ties the keys and the roster on
disk to the control transport, gossip, admission and reconnecting. Without `start` it works offline, on the
files alone. Knows no models, no ledger and no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pod import admission
from pod.address import dialable, is_loopback, multiaddr_of, with_peer
from pod.advert import AdvertBook, NodeAdvert
from pod.control import JOIN_KIND, ControlError, ControlTransport, Handler
from pod.gossip import Gossip, Replicated
from pod.identity import KeyPair, node_of_peer_id
from pod.invite import Invite, InviteError, parse, signed_invite, unsigned_invite
from pod.peer_file import PeerFile
from pod.reconnect import Reconnector
from pod.roster.apply import roster_of
from pod.roster.cuts import kept_of_invite, kept_of_member
from pod.roster.events import (
    NO_POD,
    Body,
    Event,
    InviteIssued,
    InviteRevoked,
    MemberRemoved,
    NodeRemoved,
    PodCreated,
    Role,
    RoleChanged,
    node_added,
    sign_event,
)
from pod.roster.log import RosterLog
from pod.roster.replica import RosterReplica
from pod.roster.roster import Roster

# A removed node is told by gossip first, so that it knows why, and cut off after this.
FAREWELL_S = 0.5
MAX_NUM_INVITE_ADDRESSES = 16

MakeTransport = Callable[[KeyPair, Sequence[str]], ControlTransport]

log = logging.getLogger("pod.membership")


class MembershipError(Exception):
    """What cannot be done in this pod or with these files; one line for people."""


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def libp2p_transport(key: KeyPair, listen: Sequence[str]) -> ControlTransport:
    # Loading libp2p takes a second that offline commands need not wait.
    from pod.p2p.transport import LibP2PControl

    return LibP2PControl(key, listen)


class Membership:
    """Made by `create_pod`, `open` or `join`. After `start` it belongs to one asyncio loop."""

    def __init__(self, directory: Path, clock_ms: Callable[[], int] = now_ms) -> None:
        self.directory = directory
        self.member_key = KeyPair.load(directory / "keys" / "member.pem")
        self.node_key = KeyPair.load(directory / "keys" / "node.pem")
        self._clock_ms = clock_ms
        self._log = RosterLog(directory / "roster.log")
        self._roster = self._log.roster
        self._peer_file = PeerFile(directory / "peers.json")
        self._transport: ControlTransport | None = None
        self._gossip: Gossip | None = None
        self._reconnector: Reconnector | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._farewells: set[asyncio.TimerHandle] = set()
        self._stop_discovery: Callable[[], None] = lambda: None
        self._announced: tuple[str, ...] = ()
        self._handlers: dict[str, Handler] = {}
        self._channels: list[Replicated] = [RosterReplica(self._log, lambda _: self._roster_changed())]
        self._book = AdvertBook(
            self.pod, self.node_key, os.urandom(8), lambda node: node in self._roster.nodes, clock_ms
        )
        self._book.on_change = self._adverts_changed
        self._book.on_duplicate = self._duplicate_seen
        self._channels.append(self._book)
        self._roster_callbacks: list[Callable[[Roster], None]] = []
        self._peer_callbacks: list[Callable[[bytes, bool], None]] = []
        self._advert_callbacks: list[Callable[[], None]] = []
        self._removed_callbacks: list[Callable[[], None]] = []
        self._duplicate_callbacks: list[Callable[[], None]] = []
        self._told_removed = False

    # Making one.

    @classmethod
    def create_pod(
        cls,
        directory: Path,
        pod_name: str,
        member_name: str,
        node_name: str,
        clock_ms: Callable[[], int] = now_ms,
    ) -> Membership:
        """A new pod with this member as its owner and this machine as its first node."""
        _refuse_member(directory)
        member, node = KeyPair.create(), KeyPair.create()
        created = sign_event(
            PodCreated(pod_name, member_name), NO_POD, member.public, member.sign, 0, clock_ms()
        )
        body = node_added(created.hash, member.public, node, node_name)
        added = sign_event(body, created.hash, member.public, member.sign, 1, clock_ms())
        _save_keys(directory / "keys", member, node)
        RosterLog(directory / "roster.log").add_all([created, added])
        return cls(directory, clock_ms)

    @classmethod
    def open(cls, directory: Path, clock_ms: Callable[[], int] = now_ms) -> Membership:
        if not (directory / "roster.log").exists():
            raise MembershipError("this machine is in no pod; run: pod create NAME, or: pod join INVITE")
        return cls(directory, clock_ms)

    @classmethod
    async def join(
        cls,
        directory: Path,
        invite_text: str,
        member_name: str,
        node_name: str,
        clock_ms: Callable[[], int] = now_ms,
        make_transport: MakeTransport = libp2p_transport,
    ) -> Membership:
        """Redeems an invite. Raises InviteError or JoinError with the reason; then nothing has changed.

        The keys are on disk before the request: if the answer is lost or this process dies, joining again
        with the same invite is the same member.
        """
        _refuse_member(directory)
        # Whether it has expired is for the admitting node's clock to say.
        invite = parse(invite_text, now_ms=0)
        drafts = directory / "joining"
        member = KeyPair.load_or_create(drafts / f"{invite.key.public.hex()[:16]}-member.pem")
        node = KeyPair.load_or_create(drafts / f"{invite.key.public.hex()[:16]}-node.pem")
        transport = make_transport(invite.key, [])
        try:
            await transport.start()
            admitted = await admission.join(transport, invite, member, member_name, node, node_name)
        except (admission.JoinError, ControlError) as error:
            if isinstance(error, admission.JoinError) and error.undecided:
                raise
            shutil.rmtree(drafts)
            if clock_ms() > invite.expires_ms:
                raise InviteError("the invite has expired; ask for a new one") from None
            raise admission.JoinError(str(error)) from None
        finally:
            await transport.stop()
        _save_keys(directory / "keys", member, node)
        RosterLog(directory / "roster.log").add_all(admitted.events())
        shutil.rmtree(drafts)
        membership = cls(directory, clock_ms)
        membership._remember_invite(invite)
        return membership

    # Looking.

    @property
    def pod(self) -> bytes:
        return self._log.pod

    @property
    def roster(self) -> Roster:
        return self._roster

    @property
    def node_id(self) -> bytes:
        return self.node_key.public

    @property
    def member_id(self) -> bytes:
        return self.member_key.public

    @property
    def role(self) -> Role | None:
        """None after this member was removed."""
        return self._roster.role_of(self.member_id)

    def live(self) -> frozenset[bytes]:
        """Other nodes heard of within the last three seconds."""
        return self._gossip.live() if self._gossip is not None else frozenset()

    def adverts(self) -> Mapping[bytes, NodeAdvert]:
        return self._book.all()

    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs with peer id at which others may dial this node; the last known ones when offline."""
        return self._announced or tuple(self._peer_file.addresses(self.node_id))

    # Changing.

    def issue(self, body: Body) -> Event:
        """Signs an event with the member's key, stores and gossips it. Whether it counts, the roster says."""
        return self._add(self._signed(body))

    def invite(
        self,
        role: Role = Role.MEMBER,
        max_num_uses: int = 1,
        expires_s: float = 24 * 3600,
        addresses: Sequence[str] = (),
    ) -> Invite:
        """A fresh invite, already in the roster. Its `text()` is shown once and stored nowhere."""
        if self.role is None or self.role > Role.ADMIN or self.role >= role:
            raise MembershipError(f"your role does not allow inviting a {role.name.lower()}")
        if max_num_uses < 1 or expires_s <= 0:
            raise MembershipError("an invite needs at least one use and some time")
        bootstrap = self._bootstrap(addresses)
        expires_ms = self._clock_ms() + int(expires_s * 1000)
        draft = unsigned_invite(
            self.pod, self._roster.name, bootstrap, role, expires_ms, max_num_uses, self.member_id
        )
        invite = signed_invite(draft, self.member_key.sign)
        self.issue(InviteIssued(invite.key.public, role, max_num_uses, expires_ms))
        return invite

    def remove_member(self, member: bytes) -> Event:
        """Removes a member with all its nodes and keys; what it said so far stays valid, nothing later."""
        if member not in self._roster.members:
            raise MembershipError("there is no such member")
        kept = kept_of_member(member, self._log.events())
        draft = self._signed(MemberRemoved(member, kept))
        if member in roster_of(self.pod, [*self._log.events(), draft]).members:
            raise MembershipError("your role does not allow removing this member")
        return self._add(draft)

    def certify_node(self, key: KeyPair) -> None:
        """This member's node is to go on under another key. Raises MembershipError."""
        if key.public in self._roster.nodes:
            return
        own = self._roster.nodes.get(self.node_id)
        if own is None:
            raise MembershipError("this machine is no longer in the pod")
        draft = self._signed(node_added(self.pod, self.member_id, key, own.name))
        if key.public not in roster_of(self.pod, [*self._log.events(), draft]).nodes:
            raise MembershipError("this member has as many nodes as it may have")
        self._add(draft)

    def change_role(self, member: bytes, role: Role) -> Event:
        """For the owner. What the member said in its old role stays valid, nothing that comes later does."""
        if self.role is not Role.OWNER or role is Role.OWNER or member == self.member_id:
            raise MembershipError("only the owner changes roles, and not its own")
        if member not in self._roster.members:
            raise MembershipError("there is no such member")
        return self.issue(RoleChanged(member, role, kept_of_member(member, self._log.events())))

    def revoke_invite(self, invite: bytes) -> Event:
        """Who joined with it stays; nobody else does, however the join is dated."""
        draft = self._signed(InviteRevoked(invite, kept_of_invite(invite, self._log.events())))
        record = roster_of(self.pod, [*self._log.events(), draft]).invites.get(invite)
        if record is None or not record.revoked:
            raise MembershipError("there is no such invite, or your role does not allow revoking it")
        return self._add(draft)

    def remove_node(self, node: bytes) -> Event:
        if node not in self._roster.nodes:
            raise MembershipError("there is no such node")
        draft = self._signed(NodeRemoved(node))
        if node in roster_of(self.pod, [*self._log.events(), draft]).nodes:
            raise MembershipError("your role does not allow removing this node")
        return self._add(draft)

    def publish_advert(self, body: bytes) -> None:
        """What this node offers; opaque here, replaces the last one."""
        self._book.publish(self._announced, body)
        self.changed()

    def changed(self) -> None:
        """A replicated channel has news: tell the others soon."""
        if self._gossip is not None:
            self._gossip.changed()

    def _signed(self, body: Body) -> Event:
        key = self.member_key
        return sign_event(body, self.pod, key.public, key.sign, self._log.next_lamport, self._clock_ms())

    def _add(self, event: Event) -> Event:
        self._log.add(event)
        self._roster_changed()
        return event

    # Being told.

    def on_roster_change(self, callback: Callable[[Roster], None]) -> None:
        self._roster_callbacks.append(callback)

    def on_peer(self, callback: Callable[[bytes, bool], None]) -> None:
        """Called with (node, True) when it is first heard of and (node, False) when it is dead."""
        self._peer_callbacks.append(callback)

    def on_adverts(self, callback: Callable[[], None]) -> None:
        self._advert_callbacks.append(callback)

    def on_self_removed(self, callback: Callable[[], None]) -> None:
        """Called once when this node or its member is in the roster no more."""
        self._removed_callbacks.append(callback)

    def on_duplicate(self, callback: Callable[[], None]) -> None:
        """Called when another machine runs with a copy of this node's keys."""
        self._duplicate_callbacks.append(callback)

    # Running.

    def add_replicated(self, channel: Replicated) -> None:
        """To be called before `start`."""
        self._channels.append(channel)

    def handle(self, kind: str, handler: Handler) -> None:
        """A request kind of the caller's own, for members' nodes only; to be called before `start`."""

        async def for_members(peer: bytes, payload: bytes) -> bytes:
            if peer not in self._roster.nodes:
                raise ControlError("not a member of this pod")
            return await handler(peer, payload)

        self._handlers[kind] = for_members

    async def request(self, node: bytes, kind: str, payload: bytes, timeout_s: float) -> bytes:
        """Raises ControlError."""
        if self._transport is None:
            raise ControlError("this node is not running")
        return await self._transport.request(node, kind, payload, timeout_s)

    async def start(
        self,
        listen: Sequence[str] = ("127.0.0.1:0",),
        announce: Sequence[str] = (),
        lan_discovery: bool = True,
        make_transport: MakeTransport = libp2p_transport,
    ) -> None:
        """Listens (host:port or multiaddr), announces itself (default: at its interfaces' addresses), and
        keeps connected to every node of the roster. Raises ControlError or AddressError in one line.
        """
        transport = make_transport(self.node_key, [multiaddr_of(address) for address in listen])
        gossip = Gossip(transport, lambda node: node in self._roster.nodes, "roster", time.monotonic)
        for channel in self._channels:
            gossip.add(channel)
        gossip.on_live = self._liveness_changed
        admitting = admission.Admission(self._log, self.member_id, self.issue, self._clock_ms)
        transport.handle(JOIN_KIND, admitting.handle)
        for kind, handler in self._handlers.items():
            transport.handle(kind, handler)
        self._allow(transport, self._roster, frozenset())
        reconnector = Reconnector(transport, self._wanted, self._known_addresses, time.monotonic)
        await transport.start()
        self._transport, self._gossip, self._reconnector = transport, gossip, reconnector
        self._announce(transport, announce)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(gossip.run()), loop.create_task(reconnector.run())]
        if lan_discovery and self._announced and not all(is_loopback(one) for one in self._announced):
            self._tasks.append(loop.create_task(self._discover()))

    async def stop(self) -> None:
        for timer in self._farewells:
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await asyncio.to_thread(self._stop_discovery)
        gossip, transport = self._gossip, self._transport
        self._gossip = self._transport = self._reconnector = None
        if gossip is not None:
            await gossip.stop()
        if transport is not None:
            await transport.stop()

    async def leave(self, timeout_s: float = 5.0) -> bool:
        """Removes this member from the pod. Whether another node was there to be told, for which it waits.

        Raises MembershipError for the owner. Does nothing for who was removed already.
        """
        if self.role is Role.OWNER:
            raise MembershipError("the owner cannot leave the pod")
        if self.role is None:
            return True
        told = await self._anybody_live(timeout_s)
        self.remove_member(self.member_id)
        await asyncio.sleep(FAREWELL_S)
        return told

    async def _anybody_live(self, timeout_s: float) -> bool:
        heard = asyncio.Event()
        self.on_peer(lambda _, __: heard.set())
        if not self.live() and self._gossip is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(heard.wait(), timeout_s)
        return bool(self.live())

    def _announce(self, transport: ControlTransport, announce: Sequence[str]) -> None:
        given = [with_peer(multiaddr_of(address), self.node_id) for address in announce]
        self._announced = tuple(given or dialable(transport.listen_addresses()))[:MAX_NUM_INVITE_ADDRESSES]
        self._peer_file.put(self.node_id, self._announced)
        self._book.publish(self._announced, b"")

    async def _discover(self) -> None:
        from pod.p2p.mdns import LanDiscovery

        loop = asyncio.get_running_loop()

        def found(node: bytes, addresses: tuple[str, ...]) -> None:
            loop.call_soon_threadsafe(self._learn, node, addresses)

        discovery = LanDiscovery(self.pod, self.node_id, self._announced, found)
        self._stop_discovery = discovery.stop
        await asyncio.to_thread(discovery.start)

    def _learn(self, node: bytes, addresses: Sequence[str]) -> None:
        if node == self.node_id or node not in self._roster.nodes:
            return
        if self._peer_file.put(node, addresses) and self._reconnector is not None:
            self._reconnector.soon(node)

    def _wanted(self) -> frozenset[bytes]:
        return frozenset(self._roster.nodes) - {self.node_id} if self._is_in() else frozenset()

    def _known_addresses(self, node: bytes) -> Sequence[str]:
        return self._peer_file.addresses(node)

    def _bootstrap(self, given: Sequence[str]) -> tuple[str, ...]:
        """Where a joiner may knock: here first, then at the other nodes."""
        found = [with_peer(multiaddr_of(address), self.node_id) for address in given]
        found += [address for address in self.addresses() if not found]
        for node in sorted(self._roster.nodes, key=lambda node: node not in self.live()):
            found += [with_peer(one, node) for one in self._peer_file.addresses(node) if node != self.node_id]
        if not found:
            raise MembershipError("no address of this pod is known yet; run `pod up` first or give --address")
        return tuple(dict.fromkeys(found))[:MAX_NUM_INVITE_ADDRESSES]

    def _remember_invite(self, invite: Invite) -> None:

        found: dict[bytes, list[str]] = {}
        for address in invite.addresses:
            found.setdefault(node_of_peer_id(address.rpartition("/p2p/")[2]), []).append(address)
        for node, addresses in found.items():
            self._peer_file.put(node, addresses)

    def _is_in(self) -> bool:
        return self.node_id in self._roster.nodes

    def _roster_changed(self) -> None:
        before, self._roster = self._roster, self._log.roster
        self._book.forget_strangers()
        if self._transport is not None:
            # Who leaves itself says goodbye to everybody.
            leaving = frozenset(before.nodes) - (
                frozenset(self._roster.nodes) if self._is_in() else frozenset()
            )
            self._allow(self._transport, self._roster, leaving)
            if leaving:
                timer = asyncio.get_running_loop().call_later(FAREWELL_S, self._end_farewell)
                self._farewells.add(timer)
        self.changed()
        for callback in self._roster_callbacks:
            callback(self._roster)
        if not self._is_in() and not self._told_removed:
            self._told_removed = True
            for told in self._removed_callbacks:
                told()

    def _end_farewell(self) -> None:
        self._farewells = {timer for timer in self._farewells if not timer.cancelled()}
        if self._transport is not None:
            self._allow(self._transport, self._roster, frozenset())

    def _allow(self, transport: ControlTransport, roster: Roster, leaving: frozenset[bytes]) -> None:
        nodes = frozenset(roster.nodes) if self._is_in() else frozenset()
        transport.set_allowed((nodes | leaving) - {self.node_id}, frozenset(roster.invites))

    def _liveness_changed(self, node: bytes, live: bool) -> None:
        for callback in self._peer_callbacks:
            callback(node, live)

    def _adverts_changed(self) -> None:
        for node, advert in self._book.all().items():
            self._learn(node, advert.addresses)
        for callback in self._advert_callbacks:
            callback()

    def _duplicate_seen(self) -> None:
        for callback in self._duplicate_callbacks:
            callback()


def _refuse_member(directory: Path) -> None:
    if (directory / "roster.log").exists():
        raise MembershipError(f"{directory} belongs to a pod already; `pod leave` it or use another POD_HOME")


def _save_keys(directory: Path, member: KeyPair, node: KeyPair) -> None:
    for name, key in (("member.pem", member), ("node.pem", node)):
        (directory / name).unlink(missing_ok=True)
        key.save(directory / name)
