"""The members-only door: a Noise transport that refuses, once the handshake has proven the key and before any
stream exists, whoever is not allowed in. (libp2p's own connection gate filters addresses, not keys.) Before
it a doorstep with little room, where whoever stands longest without proving anything gives way to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_noise_key_pair
from libp2p.peer.id import ID
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.transport.exceptions import SecurityUpgradeFailure
from libp2p.transport.upgrader import TransportUpgrader

from pod.identity import IdentityError, KeyPair, node_of_peer_id

MAX_NUM_HANDSHAKES_AT_ONCE = 64
# Several nodes may share an address; an honest handshake takes some milliseconds.
MAX_NUM_HANDSHAKES_PER_SOURCE = 16
HANDSHAKE_TIMEOUT_S = 5.0


@dataclass(frozen=True, eq=False, slots=True)
class _Unfinished:
    source: str
    scope: trio.CancelScope


class Doorstep(TransportUpgrader):  # type: ignore[misc]  # libp2p is followed without its types
    """Limits inbound handshakes, from their first byte on."""

    def __init__(self, *transports: object) -> None:
        super().__init__(*transports)
        self._unfinished: list[_Unfinished] = []

    async def upgrade_security(
        self, raw_conn: IRawConnection, is_initiator: bool, peer_id: ID | None = None
    ) -> ISecureConn:
        if is_initiator:
            return await super().upgrade_security(raw_conn, is_initiator, peer_id)
        remote = raw_conn.get_remote_address()
        mine = _Unfinished(remote[0] if remote else "", trio.CancelScope())
        self._make_room(mine.source)
        self._unfinished.append(mine)
        mine.scope.deadline = trio.current_time() + HANDSHAKE_TIMEOUT_S
        try:
            with mine.scope:
                return await super().upgrade_security(raw_conn, is_initiator, peer_id)
        finally:
            self._leave(mine)
        raise SecurityUpgradeFailure("the handshake was not finished in time")

    def _make_room(self, source: str) -> None:
        neighbours = [one for one in self._unfinished if one.source == source]
        if len(neighbours) >= MAX_NUM_HANDSHAKES_PER_SOURCE:
            self._give_up(neighbours[0])
        elif len(self._unfinished) >= MAX_NUM_HANDSHAKES_AT_ONCE:
            self._give_up(self._unfinished[0])

    def _give_up(self, oldest: _Unfinished) -> None:
        self._leave(oldest)
        oldest.scope.cancel()

    def _leave(self, one: _Unfinished) -> None:
        if one in self._unfinished:
            self._unfinished.remove(one)


class MembersOnlyNoise(NoiseTransport):  # type: ignore[misc]  # libp2p is followed without its types
    """`may_connect` is asked with the proven public key of everyone who dials this node."""

    def __init__(self, key: KeyPair, may_connect: Callable[[bytes], bool]) -> None:
        super().__init__(create_new_key_pair(key.seed), noise_privkey=create_new_noise_key_pair().private_key)
        self._may_connect = may_connect
        self.num_refused = 0

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        secure = await super().secure_inbound(conn)
        if not self._lets_in(str(secure.get_remote_peer())):
            self.num_refused += 1
            await secure.close()
            raise HandshakeFailure("not a member of this pod")
        return secure

    def _lets_in(self, peer_id: str) -> bool:
        try:
            return self._may_connect(node_of_peer_id(peer_id))
        except IdentityError:
            return False
