"""A pod of 5 to 30 nodes in one process, driven by one seed: honest work, a bad network, crashes, liars.

The ledgers, their rules, their sync and their signatures are the real ones; clock, network and disks are
simulated. After each change of a node its books are audited; at the end the network heals, and every honest
node that is still there must hold the same. The same seed does the same again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ledger import sync
from ledger.entry import (
    TREASURY,
    AccountOpened,
    Body,
    Disputed,
    DisputeReason,
    HoldOpened,
    HoldSettled,
    HoldVoided,
    Issued,
    ReceiptClaimed,
    Transferred,
    VoidReason,
)
from ledger.journal import JournalError
from ledger.ledger import LedgerError
from ledger.receipt import (
    Dispute,
    Receipt,
    ReceiptError,
    SignedReceipt,
    WorkCount,
    check_against_count,
    co_sign,
    sign_as_head,
    verify_head,
    verify_stage,
)
from ledger.session_record import SessionState
from tests.ledger.simulation import audit
from tests.ledger.simulation.durable import Crash, Died, Disk
from tests.ledger.simulation.liar import Liar
from tests.ledger.simulation.network import Message, Network
from tests.ledger.simulation.node import Session, SimulatedNode
from tests.ledger.simulation.people import CARD, PodDirectory, key_of, shown_key
from tests.ledger.simulation.truth import Truth, Work
from tests.ledger.world import KEY, MODEL, NUM_PARAMETERS, POD, START_MS

NUM_NODES = (5, 5, 5, 6, 6, 7, 8, 9, 12, 16, 30)
MAX_SKEW_MS = 2 * 60 * 60 * 1000
HOLD_MS = 60_000
PIECE_BYTES = (600, 4_000, 1 << 20)
MAX_NUM_HEALING_ROUNDS = 200
NUM_TRACED = 40


@dataclass(frozen=True, slots=True)
class Plan:
    """`crash_at`: the number of the one write to die at, and how; without it crashes come by chance.

    `folder`: the first node keeps its journal there in SQLite, the others in memory.
    """

    seed: int
    crash_at: tuple[int, Crash] | None = None
    folder: Path | None = None
    num_nodes: int | None = None
    num_steps: int | None = None


class Simulation:
    def __init__(self, plan: Plan) -> None:
        self.choice = choice = random.Random(plan.seed)
        self.now_ms = START_MS
        self.truth = Truth()
        self.trace: list[str] = []
        # Whose write each was, in order.
        self.writers: list[int] = []
        self._plan = plan
        num_nodes = choice.choice(NUM_NODES)
        num_nodes = plan.num_nodes or num_nodes
        self.num_steps = plan.num_steps or 70 + 5 * num_nodes
        self._crash_rate = 0.0 if plan.crash_at else choice.choice([0.0, 0.02, 0.1])
        self.network = Network(choice, num_nodes)
        # Every fourth node is a second one of the first node's member.
        members = [key_of(f"member {0 if number % 4 == 3 else number}").public for number in range(num_nodes)]
        keys = [key_of(f"node {number}") for number in range(num_nodes)]
        self.directory = PodDirectory(
            members={key.public: member for key, member in zip(keys, members, strict=True)},
            admins={keys[0].public},
        )
        skews_ms = [choice.randrange(-MAX_SKEW_MS, MAX_SKEW_MS) for _ in keys]
        disks = [Disk(plan.folder if number == 0 else None) for number in range(num_nodes)]
        self.nodes = [
            SimulatedNode(number, *parts, self.directory, lambda: self.now_ms, partial(self._crash, number))
            for number, parts in enumerate(zip(keys, members, skews_ms, disks, strict=True))
        ]
        num_liars = choice.choice([0, 1, 1, num_nodes // 4, num_nodes // 3])
        self.liars = {
            number: Liar(self, self.nodes[number]) for number in choice.sample(range(1, num_nodes), num_liars)
        }
        self.gone: set[int] = set()
        self.numbers = {node.key.public: node.number for node in self.nodes}

    # The run

    def run(self) -> None:
        """Raises AssertionError when something is not as it must be."""
        try:
            for node in self.nodes:
                self._live(node, lambda node=node: self._append(node, AccountOpened(node.member, 1)))
            for _ in range(self.num_steps):
                self._step()
            self._heal()
            audit.check_all_equal(self)
        finally:
            for node in self.nodes:
                node.stop()

    def honest(self) -> list[SimulatedNode]:
        """Nodes that follow the rules and are still there."""
        return [node for node in self.nodes if node.number not in self.liars and node.number not in self.gone]

    def _step(self) -> None:
        self.now_ms += self.choice.randrange(0, 700)
        for message in self.network.due(self.now_ms):
            if message.receiver not in self.gone:
                self._live(self.nodes[message.receiver], lambda message=message: self._receive(message))
        node = self.choice.choice([node for node in self.nodes if node.number not in self.gone])
        doings: list[tuple[int, Callable[[SimulatedNode], None]]] = [
            (40, self._gossip),
            (14, self._open_session),
            (24, self._work),
            (10, self._end_session),
            (6, self._claim),
            (4, self._move_credit),
            (1, self._split_network),
            (1, self._leave),
        ]
        if node.number in self.liars:
            doings.append((50, self.liars[node.number].lie))
        do = self.choice.choices([do for _, do in doings], [weight for weight, _ in doings])[0]
        self.note(f"{getattr(do, '__name__', do)} at {node.number}")
        self._live(node, lambda: do(node))

    def note(self, text: str) -> None:
        self.trace.append(f"{self.now_ms - START_MS} ms: {text}")
        del self.trace[:-NUM_TRACED]

    def _live(self, node: SimulatedNode, do: Callable[[], object]) -> None:
        """Do it; a node that dies of it starts again from its disk. Then its books are looked at."""
        before = node.ledger.num_entries(), node.num_lives
        try:
            do()
        except Died:
            self._restart(node)
        except JournalError:
            audit.check_nothing_is_half_done(node)
        if (node.ledger.num_entries(), node.num_lives) != before:
            audit.check_node(self, node)

    def _restart(self, node: SimulatedNode) -> None:
        """As `pod up` does: replay, then void what an earlier life left open; it may die of that again."""
        while True:
            self.truth.num_crashes += 1
            self.note(f"node {node.number} died and starts again")
            node.start()
            try:
                for hold in node.ledger.open_holds():
                    if hold.author == node.key.public:
                        self._append(node, HoldVoided(hold.session, VoidReason.FAILED))
                return
            except (Died, JournalError):
                continue

    def _crash(self, node: int) -> Crash | None:
        self.writers.append(node)
        if self._plan.crash_at is not None:
            at, crash = self._plan.crash_at
            return crash if len(self.writers) == at else None
        if self._crash_rate and self.choice.random() < self._crash_rate:
            return self.choice.choice(list(Crash))
        return None

    def _append(self, node: SimulatedNode, body: Body) -> bool:
        try:
            entry = node.ledger.append(body)
        except LedgerError:
            # A liar's fork came back to it, or its hold was too small for what it had signed.
            is_claim = isinstance(body, ReceiptClaimed)
            assert node.number in self.liars or is_claim, f"an honest {type(body).__name__} was refused"
            return False
        self.truth.promised.add((entry.author, entry.hash))
        return True

    # What nodes do

    def _gossip(self, node: SimulatedNode) -> None:
        other = self.choice.randrange(len(self.nodes))
        self.send("heads", node.number, other, sync.encode_heads(node.ledger.heads()))

    def send(self, kind: str, sender: int, receiver: int, payload: bytes) -> None:
        self.network.send(Message(kind, sender, receiver, payload), self.now_ms)

    def _open_session(self, node: SimulatedNode) -> None:
        session_id = self.choice.randbytes(16)
        payer = self._payer(node)
        num_stages = self.choice.randint(1, 3)
        numbers = [other.number for other in self.nodes]
        session = Session(
            session_id,
            payer,
            tuple(self.choice.sample(numbers, num_stages)),
            num_prompt_tokens := self.choice.randrange(1, 60),
            self.choice.choice([0, 0, num_prompt_tokens // 2]),
        )
        hold = self.hold(node, session)
        if node.number not in self.liars:
            place = (node.key.public, session_id)
            self.truth.held[place], self.truth.payers[place] = hold.amount_microcredits, payer
        if self._append(node, hold):
            node.sessions[session_id] = session

    def _payer(self, node: SimulatedNode) -> bytes:
        """Its own member, or an honest member whose tools were pointed at this honest gateway."""
        if node.number in self.liars or self.choice.random() < 0.7:
            return node.member
        return self.choice.choice(self.honest()).member

    def hold(self, node: SimulatedNode, session: Session, max_num_output_tokens: int = 80) -> HoldOpened:
        worst = Work(session.num_prompt_tokens, 0, max_num_output_tokens).price() * len(session.stages)
        hold = HoldOpened(
            session=session.id,
            payer=session.payer,
            key_id=KEY,
            model=MODEL,
            amount_microcredits=worst,
            expires_at_ms=node.now_ms() + HOLD_MS,
            rate_card_version=1,
        )
        is_own = session.payer == node.member
        return hold if is_own else replace(hold, authorization=shown_key(node.key.public, hold))

    def _work(self, node: SimulatedNode) -> None:
        """Stages compute some tokens of one of its sessions; then the head signs for them."""
        session = self._any_session(node)
        if session is None:
            return
        session.num_output_tokens = min(80, session.num_output_tokens + self.choice.randrange(1, 25))
        work = Work(session.num_prompt_tokens, session.num_cached_tokens, session.num_output_tokens)
        for index, stage in enumerate(session.stages):
            self.truth.work[node.key.public, session.id, index, self.nodes[stage].key.public] = work
        session.sequence += 1
        for index, stage in enumerate(session.stages):
            receipt = self.receipt(node, session, index, work)
            session.signed[index] = receipt
            signed = sign_as_head(receipt, node.key.sign)
            if stage == node.number:
                self._receive_receipt(node, node.number, signed.encode())
            self.send("receipt", node.number, stage, signed.encode())

    def _any_session(self, node: SimulatedNode) -> Session | None:
        return self.choice.choice(list(node.sessions.values())) if node.sessions else None

    def receipt(self, head: SimulatedNode, session: Session, index: int, work: Work) -> Receipt:
        return Receipt(
            pod=POD,
            session=session.id,
            stage_index=index,
            head=head.key.public,
            payer=session.payer,
            key_id=KEY,
            stage=self.nodes[session.stages[index]].key.public,
            model=MODEL,
            start_layer=10 * index,
            end_layer=10 * index + 10,
            num_parameters=NUM_PARAMETERS,
            rate_card_version=1,
            sequence=session.sequence,
            num_prompt_tokens=work.num_prompt_tokens,
            num_cached_tokens=work.num_cached_tokens,
            num_output_tokens=work.num_output_tokens,
            amount_microcredits=work.price(),
        )

    def _end_session(self, node: SimulatedNode) -> None:
        session = self._any_session(node)
        if session is not None:
            self._end(node, session)

    def _end(self, node: SimulatedNode, session: Session) -> None:
        del node.sessions[session.id]
        if session.num_output_tokens == 0 or self.choice.random() < 0.15:
            self._append(node, HoldVoided(session.id, self.choice.choice(list(VoidReason))))
            return
        receipts = tuple(session.co_signed[index] for index in sorted(session.co_signed))
        counts = (session.num_prompt_tokens, session.num_cached_tokens, session.num_output_tokens)
        self._append(node, HoldSettled(session.id, *counts, receipts))
        if node.number not in self.liars and self.choice.random() < 0.2:
            self._end_again(node, session)

    def _end_again(self, node: SimulatedNode, session: Session) -> None:
        """Its client went away in the same moment."""
        try:
            node.ledger.append(HoldVoided(session.id, VoidReason.CANCELLED))
        except LedgerError:
            return
        raise AssertionError("a hold was resolved twice")

    def _claim(self, node: SimulatedNode) -> None:
        """What `node/claims.py` does: present what a head that is done left out."""
        for place, signed in list(node.held.items()):
            summary = node.ledger.session(signed.receipt.head, signed.receipt.session)
            if node.ledger.counts(signed.receipt):
                del node.held[place]
            elif summary is not None and summary.state in (SessionState.SETTLED, SessionState.EXPIRED):
                del node.held[place]
                self._append(node, ReceiptClaimed(signed))

    def _move_credit(self, node: SimulatedNode) -> None:
        if node.number == 0 and self.choice.random() < 0.5:
            self._append(node, Issued(self.choice.randrange(1, 10**9)))
            return
        target = self.choice.choice(self.nodes).member
        if node.number == 0 and self.choice.random() < 0.5:
            self._append(node, Transferred(TREASURY, target, self.choice.randrange(1, 10**9)))
            return
        if target != node.member:
            self._append(node, Transferred(node.member, target, 10 ** self.choice.randrange(1, 10)))

    def _split_network(self, _: SimulatedNode) -> None:
        self.network.split()

    def _leave(self, node: SimulatedNode) -> None:
        """Removed from the pod: it never speaks again, what it wrote stays."""
        if node.number != 0 and len(self.honest()) > 3 and self.choice.random() < 0.3:
            self.gone.add(node.number)

    # What nodes hear

    def _receive(self, message: Message) -> None:
        node = self.nodes[message.receiver]
        match message.kind:
            case "heads":
                self._answer(node, message)
            case "batch":
                self._take_in(node, message.payload)
            case "receipt":
                self._receive_receipt(node, message.sender, message.payload)
            case _:
                self._receive_co_signed(node, message.payload)

    def _answer(self, node: SimulatedNode, message: Message) -> None:
        try:
            theirs = sync.decode_heads(message.payload)
        except sync.SyncError:
            return
        raws, _ = node.ledger.missing(theirs, self.choice.choice(PIECE_BYTES))
        if raws:
            if self.choice.random() < 0.2:
                self.choice.shuffle(raws)
            self.send("batch", node.number, message.sender, sync.encode_batch(raws))

    def _take_in(self, node: SimulatedNode, payload: bytes) -> None:
        try:
            raws = sync.decode_batch(payload)
        except sync.SyncError:
            return
        node.ledger.ingest(raws)

    def _receive_receipt(self, node: SimulatedNode, head: int, payload: bytes) -> None:
        """The stage compares with its own count, co-signs, keeps, answers; or writes a dispute."""
        signed = SignedReceipt.decode(payload)
        receipt = signed.receipt
        place = (receipt.head, receipt.session, receipt.stage_index)
        if node.number in self.liars:
            # Signs whatever it is paid for.
            agreed = co_sign(signed, node.key.sign)
        else:
            held = node.held.get(place)
            if held is not None and held.receipt.sequence >= receipt.sequence:
                return
            try:
                verify_head(signed)
                check_against_count(receipt, self._own_count(node, receipt, held))
            except (Dispute, ReceiptError):
                self._dispute(node, signed)
                return
            agreed = co_sign(signed, node.key.sign)
        node.held[place] = agreed
        if head == node.number:
            self._receive_co_signed(node, agreed.encode())
        self.send("co-signed", node.number, head, agreed.encode())

    def _own_count(self, node: SimulatedNode, receipt: Receipt, held: SignedReceipt | None) -> WorkCount:
        """What the stage counted; of a session nobody opened at it, nothing."""
        place = (receipt.head, receipt.session, receipt.stage_index, node.key.public)
        work = self.truth.work.get(place, Work(0, 0, 0))
        return WorkCount(
            pod=POD,
            session=receipt.session,
            stage_index=receipt.stage_index,
            head=receipt.head,
            payer=receipt.payer,
            key_id=KEY,
            stage=node.key.public,
            model=MODEL,
            start_layer=receipt.start_layer,
            end_layer=receipt.end_layer,
            num_parameters=NUM_PARAMETERS,
            rate_card=CARD,
            num_prompt_tokens=work.num_prompt_tokens,
            num_cached_tokens=work.num_cached_tokens,
            num_output_tokens=work.num_output_tokens,
            last=held.receipt if held is not None else None,
        )

    def _dispute(self, node: SimulatedNode, signed: SignedReceipt) -> None:
        try:
            verify_head(signed)
        except ReceiptError:
            return
        if signed.receipt.stage == node.key.public:
            self._append(node, Disputed(signed.receipt.session, DisputeReason.COUNTS, signed))

    def _receive_co_signed(self, node: SimulatedNode, payload: bytes) -> None:
        signed = SignedReceipt.decode(payload)
        receipt = signed.receipt
        session = node.sessions.get(receipt.session)
        if session is None or session.signed.get(receipt.stage_index) != receipt:
            return
        try:
            verify_stage(signed)
        except ReceiptError:
            return
        session.co_signed[receipt.stage_index] = signed

    # The end

    def _heal(self) -> None:
        """Everybody hears everybody again, sessions end, deadlines pass, gossip runs until it is quiet."""
        self.note("healed")
        self.network.heal()
        self._crash_rate = 0.0
        self.now_ms += 10_000
        for message in self.network.due(self.now_ms):
            if message.receiver not in self.gone:
                self._live(self.nodes[message.receiver], lambda message=message: self._receive(message))
        for node in self.honest():
            for session in list(node.sessions.values()):
                self._live(node, lambda node=node, session=session: self._end(node, session))
        self._converge()
        self.now_ms += 2 * MAX_SKEW_MS + HOLD_MS
        for node in self.honest():
            self._live(node, lambda node=node: self._claim(node))
        self._converge()

    def _converge(self) -> None:
        honest = self.honest()
        for _ in range(MAX_NUM_HEALING_ROUNDS):
            if len({node.ledger.digest() for node in honest}) == 1:
                return
            for node in honest:
                other = self.choice.choice(honest)
                theirs = sync.decode_heads(sync.encode_heads(node.ledger.heads()))
                raws, _ = other.ledger.missing(theirs, self.choice.choice(PIECE_BYTES))
                batch = sync.encode_batch(raws)
                self._live(node, lambda node=node, batch=batch: self._take_in(node, batch))
        raise AssertionError("the honest nodes do not become equal")
