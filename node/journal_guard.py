"""Whether this node may go on with its journal, found out before it writes anything; else it gets a new key.

A state directory put back from an old copy, or without its ledger, does not know its own last entries. What
it wrote next would be a second history under the same key: a fork, which freezes the author for good. So a
node asks the others for its last entry; one with a good signature that is not here is proof. Then its member
certifies a new node key, somebody is told of it, and the node starts again with a journal of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from enum import Enum

from node.errors import UserError
from node.home import PodHome
from node.ledger_thread import LedgerThread
from pod.control import ControlError
from pod.identity import IdentityError, KeyPair
from pod.membership import Membership, MembershipError

KIND = "journal"
# How long to wait for anybody, and for further answers after the first.
GRACE_S = 5.0
AFTER_FIRST_S = 1.0
ASK_TIMEOUT_S = 3.0
TELL_TIMEOUT_S = 120.0
LOOK_EVERY_S = 0.1

log = logging.getLogger(__name__)


class Verdict(Enum):
    CONTINUE = "continue"
    RENEW = "renew"


class JournalGuard:
    """`is_old`: this directory is known not to hold the newest of its journal, without asking."""

    def __init__(self, membership: Membership, ledger: LedgerThread, is_old: bool) -> None:
        self._membership = membership
        self._ledger = ledger
        self._is_old = is_old
        self._last_known = ledger.ledger.last_entry(membership.node_id)

    def handle_requests(self) -> None:
        """To be called before the membership starts."""
        self._membership.handle(KIND, self._answer)

    async def _answer(self, _peer: bytes, author: bytes) -> bytes:
        """The last entry here of that node's journal. An error when the roster here lacks the node."""
        if author not in self._membership.roster.nodes:
            raise ControlError("no such node")
        return self._ledger.ledger.last_entry(author)

    async def decide(self) -> Verdict:
        own = self._membership.node_id
        if self._is_old or self._ledger.ledger.is_frozen(own):
            return Verdict.RENEW
        answered: set[bytes] = set()
        started_s = time.monotonic()
        deadline_s = started_s + GRACE_S
        while (now_s := time.monotonic()) < deadline_s and self._others() - answered:
            if self._has_grown():
                return Verdict.RENEW
            for node in self._membership.live() - answered:
                entry = await self._ask(node, own)
                if entry is None:
                    continue
                if self._ledger.ledger.is_own_but_unknown(entry):
                    log.warning("node %s knows a later entry of this node's journal", node.hex()[:8])
                    return Verdict.RENEW
                deadline_s = min(deadline_s, now_s + AFTER_FIRST_S) if not answered else deadline_s
                answered.add(node)
            await asyncio.sleep(LOOK_EVERY_S)
        return Verdict.RENEW if self._has_grown() else Verdict.CONTINUE

    def _has_grown(self) -> bool:
        """Nothing was written here since the start, so what is new of this node came from others."""
        return self._ledger.ledger.last_entry(self._membership.node_id) != self._last_known

    def _others(self) -> frozenset[bytes]:
        return frozenset(self._membership.roster.nodes) - {self._membership.node_id}

    async def _ask(self, node: bytes, author: bytes) -> bytes | None:
        try:
            return await self._membership.request(node, KIND, author, ASK_TIMEOUT_S)
        except ControlError as error:
            log.debug("node %s does not say what it has of a journal: %s", node.hex()[:8], error)
            return None

    async def renew(self, home: PodHome) -> None:
        """Give this node a new key, which counts from its next start. Raises UserError.

        Cut short at any moment it can be done again: the next key stays the same until it is used.
        """
        try:
            key = KeyPair.load_or_create(home.next_key_file)
            self._membership.certify_node(key)
        except (IdentityError, MembershipError) as error:
            raise UserError(f"this node needs a new key: {error}") from None
        await self._tell(key.public)
        home.adopt_next_key(self._membership.node_id)

    async def _tell(self, node: bytes) -> None:
        """The others let in only whom they know, and learn of the new key from the old one."""
        others = self._others() - {node}
        deadline_s = time.monotonic() + TELL_TIMEOUT_S
        while others:
            for peer in self._membership.live():
                if await self._ask(peer, node) is not None:
                    return
            if time.monotonic() > deadline_s:
                raise UserError(
                    "this node was restored, or its ledger was lost: it needs to reach another node of the "
                    "pod once, before it may write in a journal again"
                )
            await asyncio.sleep(LOOK_EVERY_S)

    def retire_old_key(self, home: PodHome) -> None:
        """After the start with the new key: the old one is nobody's any more."""
        for node in home.retired_nodes() - {self._membership.node_id}:
            if node in self._membership.roster.nodes:
                self._membership.remove_node(node)
        home.forget_retired()
