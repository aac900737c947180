"""The libp2p host of one node, on the trio side: listens, dials, and keeps one framed stream per connection.
It uses libp2p's swarm without the host on top: identify, ping and other protocols are not offered, so that a
connection can carry nothing but control frames. Knows no requests and no roster.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio
from libp2p.abc import INetConn, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL_ID
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_PROTOCOL_ID
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service import background_trio_service
from libp2p.transport.exceptions import MuxerUpgradeFailure
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

from pod.address import host_port_of
from pod.control import ControlError, RefusedError
from pod.identity import KeyPair, node_of_peer_id, peer_id
from pod.p2p.frames import ControlFrame
from pod.p2p.gate import HANDSHAKE_TIMEOUT_S, Doorstep, MembersOnlyNoise
from pod.p2p.link import Link

PROTOCOL = TProtocol("/gpu-pod/control/1")
NEGOTIATE_TIMEOUT_S = 5
DIAL_TIMEOUT_S = 5.0
MAX_NUM_CONNECTIONS = 2048
# A joiner needs one request; its door closes behind it.
JOINER_LINK_TIMEOUT_S = 30.0

# 28 % less CPU per message: window credit is given back in batches.
os.environ.setdefault("PY_YAMUX_RELEASE_ON_READ", "0")

log = logging.getLogger("pod.p2p")


@dataclass(frozen=True, slots=True)
class HostEvents:
    """Called in the host's thread. `on_links` says how many links to a peer are left after a change."""

    on_frame: Callable[[Link, ControlFrame], None]
    on_links: Callable[[bytes, int], None]
    may_connect: Callable[[bytes], bool]
    is_node: Callable[[bytes], bool]


class Host:
    """Lives for one run of the trio loop; all methods belong to it."""

    def __init__(self, key: KeyPair, listen: Sequence[str], events: HostEvents) -> None:
        self._events = events
        self._listen = listen
        self._links: dict[bytes, list[Link]] = {}
        self._node_id = key.public
        self.gate = MembersOnlyNoise(key, events.may_connect)
        self._swarm = _swarm(key, self.gate)
        self._swarm.set_stream_handler(self._accept)
        self._nursery: trio.Nursery | None = None

    async def run(self, on_ready: Callable[[list[str]], None]) -> None:
        """Until cancelled. `on_ready` gets the addresses that are listened on, without peer id."""
        async with background_trio_service(self._swarm), trio.open_nursery() as nursery:
            self._nursery = nursery
            on_ready(await self._start_listening())
            await trio.sleep_forever()

    async def dial(self, peer: bytes, addresses: Sequence[str]) -> None:
        """Tries one address after the other. Raises ControlError that lists what was tried."""
        if self._links.get(peer):
            return
        failures = []
        refused = False
        for address in addresses:
            try:
                await self._dial_one(peer, address)
            except ControlError as error:
                failures.append(f"{address}: {error}")
                refused = refused or isinstance(error, RefusedError)
                continue
            return
        tried = "; ".join(failures) or "no address known"
        raise (RefusedError if refused else ControlError)(f"cannot connect to {peer_id(peer)} ({tried})")

    def best_link(self, peer: bytes) -> Link | None:
        """The one last heard on: that it is open says nothing about the other end."""
        links = self._links.get(peer)
        return links[-1] if links else None

    def drop(self, peer: bytes) -> None:
        for link in self._links.pop(peer, []):
            self._spawn(link.close)
        self._events.on_links(peer, 0)

    def drop_outsiders(self) -> None:
        for peer in [peer for peer in self._links if not self._events.may_connect(peer)]:
            self.drop(peer)

    async def _start_listening(self) -> list[str]:
        addresses = [Multiaddr(address) for address in self._listen]
        for address in addresses:
            _refuse_taken_port(address)
        if addresses and not await self._swarm.listen(*addresses):
            raise ControlError(f"cannot listen on {', '.join(self._listen)}")
        return [str(one) for listener in self._swarm.listeners.values() for one in listener.get_addrs()]

    async def _dial_one(self, peer: bytes, address: str) -> None:
        """Straight to the address: no happy-eyeballs delay, and no cache of peers that failed before."""
        connection = None
        try:
            with trio.fail_after(DIAL_TIMEOUT_S):
                target = await _address_of(address, peer)
                connection = await self._swarm.dial_addr(target, ID.from_base58(peer_id(peer)))
                stream = await connection.new_stream()
                communicator = MultiselectCommunicator(stream)
                await MultiselectClient().select_one_of([PROTOCOL], communicator, NEGOTIATE_TIMEOUT_S)
        except trio.TooSlowError:
            await _give_up(connection)
            raise ControlError(f"no answer within {DIAL_TIMEOUT_S:g} s") from None
        except ControlError:
            raise
        except Exception as error:
            await _give_up(connection)
            raise _reason_of(error) from None
        self._spawn(self._run_link, Link(peer, stream, False, self._on_frame))

    async def _accept(self, stream: INetStream) -> None:
        """A stream a peer opened. Nothing may escape: an exception here would take the host down."""
        try:
            peer = node_of_peer_id(str(stream.muxed_conn.peer_id))
            communicator = MultiselectCommunicator(stream)
            await Multiselect({PROTOCOL: None}).negotiate(communicator, NEGOTIATE_TIMEOUT_S)
            if self._events.may_connect(peer):
                await self._run_link(Link(peer, stream, True, self._on_frame))
        except Exception as error:
            log.debug("an incoming stream ended: %r", error)

    def _on_frame(self, link: Link, frame: ControlFrame) -> None:
        links = self._links.get(link.peer, [])
        if link in links and links[-1] is not link:
            links.remove(link)
            links.append(link)
        self._events.on_frame(link, frame)

    async def _run_link(self, link: Link) -> None:
        links = self._links.setdefault(link.peer, [])
        # Two nodes that dial each other at once keep both links. A peer that dials again has lost its
        # last one, even where this side cannot see that yet. Joiners who share an invite share its key: each
        # keeps its own link for the little while a join takes.
        is_node = self._events.is_node(link.peer)
        for replaced in [one for one in links if is_node and one.inbound == link.inbound]:
            links.remove(replaced)
            self._spawn(replaced.close)
        links.append(link)
        self._events.on_links(link.peer, len(links))
        if not is_node:
            self._spawn(_close_later, link)
        try:
            await link.run()
        except Exception as error:
            log.debug("a link ended: %r", error)
        finally:
            self._forget(link)

    def _forget(self, link: Link) -> None:
        links = self._links.get(link.peer, [])
        if link not in links:
            return
        links.remove(link)
        if not links:
            del self._links[link.peer]
        self._events.on_links(link.peer, len(links))

    def _spawn(self, task: Callable[..., object], *args: object) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(task, *args)  # type: ignore[arg-type]


async def _close_later(link: Link) -> None:
    await trio.sleep(JOINER_LINK_TIMEOUT_S)
    await link.close()


async def _give_up(connection: INetConn | None) -> None:
    if connection is not None:
        with trio.move_on_after(1.0):
            await connection.close()


def _swarm(key: KeyPair, gate: MembersOnlyNoise) -> Swarm:
    own_id = ID.from_base58(peer_id(key.public))
    peerstore = PeerStore()
    peerstore.add_key_pair(own_id, create_new_key_pair(key.seed))
    upgrader = Doorstep({NOISE_PROTOCOL_ID: gate}, {TProtocol(YAMUX_PROTOCOL_ID): Yamux})
    limits = ConnectionConfig(
        max_connections=MAX_NUM_CONNECTIONS,
        high_watermark=MAX_NUM_CONNECTIONS,
        min_connections=0,
        low_watermark=0,
        max_connections_per_peer=4,
        auto_connect_interval=86_400.0,
        inbound_upgrade_timeout=HANDSHAKE_TIMEOUT_S,
    )
    swarm = Swarm(own_id, peerstore, upgrader, [TCP()], RetryConfig(max_retries=0), limits)
    # Slots of ended connections are never given back; the handshakes at once are limited by the doorstep.
    swarm._inbound_limiter.total_tokens = math.inf
    return swarm


async def _address_of(address: str, peer: bytes) -> Multiaddr:
    """Resolves names as the system does: libp2p asks DNS only and knows no hosts file."""
    if address.startswith("/dns"):
        host, port = host_port_of(address)
        try:
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ControlError(f"the name {host} cannot be resolved: {error.strerror}") from None
        family, ip = found[0][0], found[0][4][0]
        address = f"/ip{6 if family == socket.AF_INET6 else 4}/{ip}/{address.split('/', 3)[3]}"
    try:
        parsed = Multiaddr(address)
        named = parsed.value_for_protocol("p2p") if "/p2p/" in address else None
    except Exception:
        raise ControlError("not a multiaddr") from None
    if named is not None and named != peer_id(peer):
        raise ControlError("the address is another node's")
    return parsed


def _reason_of(error: BaseException) -> ControlError:
    """What a chain of libp2p exceptions means to people."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, MuxerUpgradeFailure):
            return RefusedError("it answered, but did not let this key in")
        if isinstance(link, OSError) and link.strerror:
            return ControlError(link.strerror)
        if isinstance(link, PeerIDMismatchesPubkey):
            return ControlError("another node answers there")
        link = link.__cause__ or link.__context__
    return ControlError(str(error) or type(error).__name__)


def _refuse_taken_port(address: Multiaddr) -> None:
    """libp2p listens with SO_REUSEPORT, which would quietly share the port of another process."""
    host = address.value_for_protocol("ip6" if address.protocols()[0].name == "ip6" else "ip4")
    port = int(address.value_for_protocol("tcp") or 0)
    with socket.socket(socket.AF_INET6 if ":" in str(host) else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            is_taken = error.errno == errno.EADDRINUSE
            reason = "the port is taken by another program" if is_taken else error.strerror
            raise ControlError(f"cannot listen on {host} port {port}: {reason} (--listen)") from None
