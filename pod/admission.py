"""Joining a pod. The joiner dials with the invite's key as its libp2p identity, so the handshake proves it,
and sends one request; the node that admits it checks, signs, adds and answers with the roster's events. A
refusal says why. The admitting node's clock judges the expiry.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pod.canonical import DecodeError, Length, decode_record, encode_record
from pod.control import ControlError, ControlTransport, RefusedError
from pod.identity import IdentityError, KeyPair, node_of_peer_id
from pod.invite import Invite
from pod.roster.apply import RosterError
from pod.roster.events import (
    Application,
    Event,
    EventError,
    MemberJoined,
    Role,
    application,
    decode_application,
    decode_event,
)
from pod.roster.log import RosterLog
from pod.roster.replica import decode_page, event_page
from pod.roster.roster import InviteState, Roster

JOIN_TIMEOUT_S = 10.0
# A lost answer is asked for again for so long, after a pause.
MAX_REPEAT_S = 8.0
REPEAT_DELAY_S = (0.2, 1.0)
CONNECT_TIMEOUT_S = 12.0
MAX_PAGE_BYTES = 512 * 1024
MAX_NUM_PAGES = 64

_WHY_NOT_OPEN = {
    InviteState.USED: "the invite was already used; ask for a new one",
    InviteState.EXPIRED: "the invite has expired; ask for a new one",
    InviteState.REVOKED: "the invite was revoked",
}


class JoinError(Exception):
    """Why joining failed; one line for people. `undecided`: it was asked for and the answer was lost."""

    def __init__(self, message: str, undecided: bool = False) -> None:
        super().__init__(message)
        self.undecided = undecided


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """`num_known` events were received by earlier requests; the answer goes on behind them."""

    application: Annotated[bytes, Length(1, 4096)]
    num_known: int


@dataclass(frozen=True, slots=True)
class JoinAnswer:
    page: Annotated[bytes, Length(0, MAX_PAGE_BYTES + 256 * 1024)]
    more: int


class Admission:
    """The admitting side. `admit` signs and adds an event in the name of this node's member."""

    def __init__(
        self,
        log: RosterLog,
        own_member: bytes,
        admit: Callable[[MemberJoined], Event],
        clock_ms: Callable[[], int],
    ) -> None:
        self._log = log
        self._own_member = own_member
        self._admit = admit
        self._clock_ms = clock_ms

    async def handle(self, peer: bytes, payload: bytes) -> bytes:
        """The handler of `join`; `peer` is the invite's key. ControlError says why not."""
        try:
            request = decode_record(JoinRequest, payload, 8192)
            joiner = decode_application(request.application)
        except (DecodeError, EventError) as error:
            raise ControlError(f"the invite was tampered with or the request is damaged: {error}") from None
        if peer != joiner.invite:
            raise ControlError("the invite was tampered with: another key was proven")
        if not self._is_admitted(joiner):
            self._check(joiner, self._log.roster)
            self._admit(MemberJoined(request.application))
            if not self._is_admitted(joiner):
                raise ControlError("the pod's rules do not let this node admit anybody")
        page, more = event_page(list(self._log.events()[request.num_known :]), MAX_PAGE_BYTES)
        return encode_record(JoinAnswer(page, int(more)))

    def _is_admitted(self, joiner: Application) -> bool:
        """Also true when it asks again because the first answer was lost."""
        roster = self._log.roster
        invite = roster.invites.get(joiner.invite)
        return (
            invite is not None
            and joiner.member in invite.members
            and roster.member_of_node(joiner.node) == joiner.member
        )

    def _check(self, joiner: Application, roster: Roster) -> None:
        invite = roster.invites.get(joiner.invite)
        if joiner.pod != roster.pod or invite is None:
            raise ControlError("the invite is not for this pod")
        state = invite.state(self._clock_ms())
        if state is not InviteState.OPEN:
            raise ControlError(_WHY_NOT_OPEN[state])
        if joiner.member in roster.removed or joiner.node in roster.removed:
            raise ControlError("this key was removed from the pod; use a fresh home directory")
        if joiner.member in roster.members or joiner.node in roster.nodes:
            raise ControlError("this key is in the pod already")
        if roster.member_named(joiner.member_name) is not None:
            raise ControlError(
                f"the name {joiner.member_name!r} is taken in this pod; choose another (--member)"
            )
        if roster.role_of(self._own_member) in (Role.GUEST, None):
            raise ControlError("this node belongs to a guest, who cannot admit anybody; try another address")


async def join(
    transport: ControlTransport,
    invite: Invite,
    member: KeyPair,
    member_name: str,
    node: KeyPair,
    node_name: str,
) -> RosterLog:
    """The pod's events, in memory, once admitted. `transport` must have the invite's key as its identity.

    Raises JoinError: the reason of the refusal, or every address that was tried.
    """
    draft = application(invite.pod, invite.key, member, member_name, node, node_name)
    began_s = time.monotonic()
    while True:
        try:
            return await _join_once(transport, invite, draft, node.public)
        except JoinError as error:
            if not error.undecided or time.monotonic() - began_s > MAX_REPEAT_S:
                raise
        # Two who use one invite at the same moment share its key: the later link replaces the earlier.
        await asyncio.sleep(random.uniform(*REPEAT_DELAY_S))  # noqa: S311  # spreads repeats, no secret


async def _join_once(transport: ControlTransport, invite: Invite, draft: bytes, node: bytes) -> RosterLog:
    """One round over the invite's addresses. JoinError is undecided when an answer was lost."""
    failures: list[str] = []
    undecided = False
    for peer, addresses in _by_node(invite.addresses).items():
        transport.set_allowed(frozenset({peer}), frozenset())
        try:
            await transport.connect(peer, addresses, CONNECT_TIMEOUT_S)
        except RefusedError as error:
            failures.append(f"{error}: it knows no such invite (not for its pod, or too fresh)")
            continue
        except ControlError as error:
            failures.append(str(error))
            continue
        try:
            return await _ask(transport, peer, invite, draft, node)
        except RefusedError as error:
            raise JoinError(str(error)) from None
        except ControlError as error:
            failures.append(str(error))
            undecided = True
    tried = " | ".join(failures)
    raise JoinError(f"no node of the pod {invite.pod_name!r} could be reached: {tried}", undecided)


async def _ask(
    transport: ControlTransport, peer: bytes, invite: Invite, draft: bytes, node: bytes
) -> RosterLog:
    """One round trip unless the roster is larger than a page."""
    log = RosterLog(None, pod=invite.pod)
    num_received = 0
    for _ in range(MAX_NUM_PAGES):
        request = encode_record(JoinRequest(draft, num_received))
        raw = await transport.request(peer, "join", request, JOIN_TIMEOUT_S)
        try:
            answer = decode_record(JoinAnswer, raw, 4 * MAX_PAGE_BYTES)
            page = decode_page(answer.page)
            log.add_possible([decode_event(event) for event in page])
            num_received += len(page)
            if not answer.more and node in log.roster.nodes and peer in log.roster.nodes:
                return log
        except (DecodeError, EventError, RosterError) as error:
            raise JoinError(f"the answer makes no sense: {error}") from None
        if not page:
            break
    raise JoinError("the answer does not make this node a member of the invite's pod")


def _by_node(addresses: tuple[str, ...]) -> dict[bytes, list[str]]:
    found: dict[bytes, list[str]] = {}
    for address in addresses:
        try:
            node = node_of_peer_id(address.rpartition("/p2p/")[2])
        except IdentityError:
            raise JoinError(f"the invite's address {address} names no node") from None
        found.setdefault(node, []).append(address)
    return found
