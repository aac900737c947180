"""The members-only door: a Noise transport that refuses, once the handshake has proven the key and before any
stream exists, whoever is not allowed in. (libp2p's own connection gate filters addresses, not keys.)
"""

from __future__ import annotations

from collections.abc import Callable

from libp2p.abc import IRawConnection, ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_noise_key_pair
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.noise.transport import Transport as NoiseTransport

from pod.identity import IdentityError, KeyPair, node_of_peer_id

MAX_NUM_HANDSHAKES_AT_ONCE = 64


class MembersOnlyNoise(NoiseTransport):  # type: ignore[misc]  # libp2p is followed without its types
    """`may_connect` is asked with the proven public key of everyone who dials this node."""

    def __init__(self, key: KeyPair, may_connect: Callable[[bytes], bool]) -> None:
        super().__init__(create_new_key_pair(key.seed), noise_privkey=create_new_noise_key_pair().private_key)
        self._may_connect = may_connect
        self._num_handshakes = 0
        self.num_refused = 0

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        if self._num_handshakes >= MAX_NUM_HANDSHAKES_AT_ONCE:
            raise HandshakeFailure("too many handshakes at once")
        self._num_handshakes += 1
        try:
            secure = await super().secure_inbound(conn)
        finally:
            self._num_handshakes -= 1
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
