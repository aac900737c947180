"""This node's part in the pod's authority, which has no server of its own.

The owner's node holds the authority's key, and nobody else ever does; its certificate is in the roster, so
every node knows it. Admins' nodes hold issuers under it, for half a year each, so that certificates can be
had while the owner's machine is off. Both sign for roster nodes that ask over the control plane.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from node.errors import UserError
from node.tls.certificates import (
    CertificateError,
    CertifiedKey,
    check_chain,
    covers,
    make_authority,
    new_key,
    read_chain,
    request_of,
    sign_issuer,
    sign_server,
)
from pod.canonical import DecodeError, decode, encode
from pod.control import ControlError
from pod.membership import Membership
from pod.roster.events import AuthoritySet, Role

CERTIFICATE_KIND = "https-certificate"
ISSUER_KIND = "https-issuer"
ASK_TIMEOUT_S = 10.0
MAX_NUM_ASKED = 8
MAX_ANSWER_BYTES = 32 * 1024

log = logging.getLogger(__name__)


class Authority:
    """Keys live in `keys_dir`: `authority.pem` at the owner, `issuer.pem` at admins."""

    def __init__(self, membership: Membership, keys_dir: Path, clock_ms: Callable[[], int]) -> None:
        self._membership = membership
        self._own_file = keys_dir / "authority.pem"
        self._issuer_file = keys_dir / "issuer.pem"
        self._clock_ms = clock_ms
        self._own: CertifiedKey | None = None
        self._issuer: CertifiedKey | None = None

    @property
    def certificate_der(self) -> bytes | None:
        """The pod's, as the roster has it; None until the owner's node has run once."""
        return self._membership.roster.authority_der

    def ensure(self) -> None:
        """At the owner's: make the authority if the pod has none yet."""
        if self._membership.role is not Role.OWNER:
            return
        if self.certificate_der is None:
            self.renew()
        elif self._own_key() is None:
            log.warning(
                "%s lacks the key of the pod's authority; `pod ca --renew` makes a new one", self._own_file
            )

    def renew(self) -> None:
        """A new authority in place of the old one, in which nobody need believe any more. UserError."""
        if self._membership.role is not Role.OWNER:
            raise UserError("only the pod's owner makes its authority")
        roster = self._membership.roster
        made = make_authority(roster.pod, roster.name, self._clock_ms())
        made.save(self._own_file)
        self._membership.issue(AuthoritySet(made.certificate.public_bytes(Encoding.DER)))

    def handle_requests(self) -> None:
        """To be called before the membership starts."""
        self._membership.handle(CERTIFICATE_KIND, self._answer_certificate)
        self._membership.handle(ISSUER_KIND, self._answer_issuer)

    def signer(self) -> CertifiedKey | None:
        """What this node signs with now, or None: it is not among those who do."""
        own = self._own_key()
        if own is not None:
            return own
        return self._issuer_key()

    async def refresh_issuer(self) -> None:
        """At an admin's: fetch an issuer when there is none or its time is half over."""
        if self._membership.role not in (Role.OWNER, Role.ADMIN):
            # An issuer of a former admin is of no use to an honest node.
            self._issuer_file.unlink(missing_ok=True)
            self._issuer = None
            return
        held = self._issuer_key()
        if self._own_key() is not None or (held is not None and not held.is_past_half(self._clock_ms())):
            return
        key = new_key()
        chain = await self._ask(ISSUER_KIND, key, (), self._nodes_of(Role.OWNER))
        if chain is not None:
            self._issuer = CertifiedKey(key, chain)
            self._issuer.save(self._issuer_file)
            log.info("this node signs HTTPS certificates of the pod until %s", chain[0].not_valid_after_utc)

    def certify_here(self, names: Sequence[str]) -> CertifiedKey | None:
        """A fresh key and certificate for this node's gateway, if this node signs itself."""
        signer = self.signer()
        if signer is None:
            return None
        key = new_key()
        try:
            return CertifiedKey(key, read_chain(self._sign(signer, request_of(key, names))))
        except CertificateError as error:
            log.warning("this node cannot sign a certificate for itself: %s", error)
            return None

    async def certify(self, names: Sequence[str]) -> CertifiedKey | None:
        """The same with the help of others; None when nobody who signs is there."""
        made = self.certify_here(names)
        if made is not None:
            return made
        key = new_key()
        nodes = self._nodes_of(Role.OWNER) + self._nodes_of(Role.ADMIN)
        chain = await self._ask(CERTIFICATE_KIND, key, names, nodes)
        return CertifiedKey(key, chain) if chain is not None else None

    def _own_key(self) -> CertifiedKey | None:
        """The authority's own key, if it is here and still the pod's."""
        if self._membership.role is not Role.OWNER or self.certificate_der is None:
            return None
        if self._own is None or not self._is_current(self._own):
            self._own = CertifiedKey.load(self._own_file)
        return self._own if self._own is not None and self._is_current(self._own) else None

    def _is_current(self, own: CertifiedKey) -> bool:
        return own.certificate.public_bytes(Encoding.DER) == self.certificate_der

    def _issuer_key(self) -> CertifiedKey | None:
        if self._membership.role not in (Role.OWNER, Role.ADMIN) or self.certificate_der is None:
            return None
        if self._issuer is None:
            self._issuer = CertifiedKey.load(self._issuer_file)
        if self._issuer is None or not self._is_good(self._issuer):
            return None
        return self._issuer

    def _is_good(self, held: CertifiedKey) -> bool:
        try:
            check_chain(held.chain, self.certificate_der or b"", self._clock_ms())
        except CertificateError:
            return False
        return True

    def _nodes_of(self, role: Role) -> list[bytes]:
        """Live nodes of members with this role."""
        roster = self._membership.roster
        live = self._membership.live()
        found = [one.id for one in roster.nodes.values() if one.id in live]
        return sorted(node for node in found if roster.members[roster.nodes[node].member].role is role)

    async def _ask(
        self, kind: str, key: ec.EllipticCurvePrivateKey, names: Sequence[str], nodes: Sequence[bytes]
    ) -> tuple[x509.Certificate, ...] | None:
        """The first chain for `key` and `names` under the authority, asking one node after the other."""
        authority_der = self.certificate_der
        if authority_der is None:
            return None
        csr = request_of(key, names)
        for node in nodes[:MAX_NUM_ASKED]:
            try:
                answer = await self._membership.request(node, kind, csr, ASK_TIMEOUT_S)
                chain = _read_answer(answer)
                if chain[0].public_key() != key.public_key():
                    raise CertificateError("it is for another key")
                if not covers(chain[0], names):
                    raise CertificateError("it is not for the names that were asked for")
                check_chain(chain, authority_der, self._clock_ms())
            except (ControlError, CertificateError, DecodeError) as error:
                log.info("no certificate from %s: %s", node.hex()[:8], error)
            else:
                return chain
        return None

    async def _answer_certificate(self, peer: bytes, csr: bytes) -> bytes:
        signer = self.signer()
        if signer is None:
            raise ControlError("this node does not sign certificates")
        try:
            return encode(self._sign(signer, csr))
        except CertificateError as error:
            raise ControlError(str(error)) from None

    async def _answer_issuer(self, peer: bytes, csr: bytes) -> bytes:
        own = self._own_key()
        roster = self._membership.roster
        member = roster.member_of_node(peer)
        if own is None:
            raise ControlError("this node does not hold the authority's key")
        if member is None or roster.members[member].role not in (Role.OWNER, Role.ADMIN):
            raise ControlError("only admins' nodes sign certificates")
        try:
            made = sign_issuer(own, csr, peer, roster.name, self._clock_ms())
        except CertificateError as error:
            raise ControlError(str(error)) from None
        log.info("%s signs HTTPS certificates until %s", roster.nodes[peer].name, made.not_valid_after_utc)
        return encode([made.public_bytes(Encoding.DER)])

    def _sign(self, signer: CertifiedKey, csr: bytes) -> list[bytes]:
        """The chain (DER) from the new certificate up to, and without, the authority. CertificateError."""
        try:
            made = sign_server(signer, csr, self._membership.roster.name, self._clock_ms())
        except CertificateError:
            raise
        except Exception as error:  # what this node signs with was signed by another
            raise CertificateError(f"it cannot be signed here ({type(error).__name__})") from None
        above = signer.chain if signer is not self._own else ()
        return [one.public_bytes(Encoding.DER) for one in (made, *above)]


def _read_answer(answer: bytes) -> tuple[x509.Certificate, ...]:
    """Raises DecodeError or CertificateError."""
    ders = decode(answer, MAX_ANSWER_BYTES)
    if not isinstance(ders, list) or not all(isinstance(der, bytes) for der in ders):
        raise DecodeError("not a list of certificates")
    return read_chain(ders)
