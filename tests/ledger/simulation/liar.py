"""A node with a key of the pod and no manners: it signs what it likes and sends it to whom it likes.

It keeps a real ledger besides, so that its lies stand in a journal that others have reason to fetch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ledger import canonical, sync
from ledger.chains import MAX_NUM_BRANCHES, Tip
from ledger.entry import (
    FIRST_PREV_HASH,
    MAX_TIME_MS,
    TREASURY,
    AccountOpened,
    Body,
    Disputed,
    DisputeReason,
    Entry,
    HoldOpened,
    HoldSettled,
    HoldVoided,
    Issued,
    ReceiptClaimed,
    Transferred,
    VoidReason,
    decode_entry,
    sign_entry,
)
from ledger.receipt import SignedReceipt, co_sign, sign_as_head
from tests.ledger.simulation.node import Session, SimulatedNode
from tests.ledger.simulation.people import key_of
from tests.ledger.simulation.truth import Work
from tests.ledger.world import POD

if TYPE_CHECKING:
    from tests.ledger.simulation.simulation import Simulation

# Fewer than the branches a replica keeps: beyond those, see docs/security.md.
MAX_NUM_FORKS = MAX_NUM_BRANCHES // 3


class Liar:
    def __init__(self, simulation: Simulation, node: SimulatedNode) -> None:
        self._simulation = simulation
        self._node = node
        self._num_forks = 0
        self._lies: tuple[Callable[[], None], ...] = (
            self._fork,
            self._fork,
            self._replay,
            self._write_for_a_foreign_pod,
            self._write_what_breaks_a_rule,
            self._settle_wrong_sums,
            self._sign_above_the_work,
            self._claim_unsigned_work,
            self._claim_unsigned_work,
            self._collude,
            self._hold_too_little,
            self._hold_too_little,
            self._hijack_a_hold,
            self._resolve_twice,
            self._travel_in_time,
            self._let_strangers_write,
            self._write_as_another,
            self._send_noise,
            self._boast,
        )

    def lie(self, _: SimulatedNode) -> None:
        lie = self._simulation.choice.choice(self._lies)
        self._simulation.note(f"liar {self._node.number}: {lie.__name__}")
        self._simulation.truth.num_lies += 1
        lie()

    # Means

    def _own_entries(self) -> list[Entry]:
        raws, _ = self._node.ledger.missing({}, 1 << 30)
        entries = (decode_entry(raw) for raw in raws)
        return [entry for entry in entries if entry.author == self._node.key.public]

    def _sign(self, index: int, prev_hash: bytes, body: Body, time_ms: int | None = None) -> Entry:
        key = self._node.key
        time_ms = self._node.now_ms() if time_ms is None else time_ms
        return sign_entry(POD, key.public, index, prev_hash, time_ms, body, key.sign)

    def _next(self, body: Body, time_ms: int | None = None) -> Entry:
        """What would come next in its journal; nothing is checked, nothing is written."""
        last = self._node.ledger.heads().get(self._node.key.public)
        index, prev_hash = (last[-1].index + 1, last[-1].hash) if last else (0, FIRST_PREV_HASH)
        return self._sign(index, prev_hash, body, time_ms)

    def _write(self, entry: Entry) -> None:
        """Into its own journal by the way others' entries take, past the checks on own ones."""
        self._node.ledger.ingest([entry.raw])

    def _tell(self, *entries: Entry) -> None:
        """Some of the others, each as if it had asked, with all that came before in its journal."""
        self._tell_raws(*(entry.raw for entry in [*self._own_entries(), *entries]))

    def _tell_forbidden(self, entry: Entry, *before: Entry) -> None:
        """`entry` is one that nobody may take in."""
        self._simulation.truth.forbidden.add(entry.hash)
        self._tell(*before, entry)

    def _tell_raws(self, *raws: bytes) -> None:
        choice, nodes = self._simulation.choice, self._simulation.nodes
        for node in choice.sample(nodes, choice.randint(1, min(4, len(nodes)))):
            self._simulation.send("batch", self._node.number, node.number, sync.encode_batch(raws))

    def _other(self) -> SimulatedNode:
        return self._simulation.choice.choice(self._simulation.nodes)

    def _victim(self) -> SimulatedNode:
        return self._simulation.choice.choice(self._simulation.honest())

    def _accomplice(self) -> SimulatedNode:
        number = self._simulation.choice.choice(list(self._simulation.liars))
        return self._simulation.nodes[number]

    def _session(self, *stages: SimulatedNode) -> Session:
        choice = self._simulation.choice
        numbers = tuple(stage.number for stage in stages)
        return Session(choice.randbytes(16), self._node.member, numbers, 10, 0, sequence=choice.randrange(9))

    def _signed(self, of: Session, work: Work, **changes: object) -> SignedReceipt:
        """As head and, whoever the stage is, with a stage's signature made with its own key."""
        receipt = replace(self._simulation.receipt(self._node, of, 0, work), **changes)  # type: ignore[arg-type]
        return co_sign(sign_as_head(receipt, self._node.key.sign), self._node.key.sign)

    # Lies

    def _fork(self) -> None:
        """Another entry where one is already, sometimes with one more behind it; told to a few."""
        entries = self._own_entries()
        if not entries or self._num_forks >= MAX_NUM_FORKS:
            return
        self._num_forks += 1
        choice = self._simulation.choice
        endings = [
            entry for entry in entries if isinstance(entry.body, HoldOpened | HoldSettled | HoldVoided)
        ]
        at = choice.choice(endings if endings and choice.random() < 0.6 else entries)
        friend = self._accomplice().member
        bodies: list[Body] = [
            AccountOpened(self._node.member, 1, choice.randbytes(4)),
            self._simulation.hold(self._node, self._session(self._other())),
        ]
        if friend != self._node.member:
            bodies.append(Transferred(self._node.member, friend, 10 ** choice.randrange(3, 12)))
        if isinstance(at.body, HoldSettled | HoldVoided):
            bodies = [
                HoldVoided(at.body.session, VoidReason.NO_ROUTE),
                HoldSettled(at.body.session, 3, 0, 1, ()),
            ]
        if isinstance(at.body, HoldOpened):
            bodies.append(replace(at.body, amount_microcredits=at.body.amount_microcredits // 2))
        rival = self._sign(at.index, at.prev_hash, choice.choice(bodies))
        later = self._sign(at.index + 1, rival.hash, AccountOpened(self._node.member, 1))
        branch = [rival.raw, later.raw] if choice.random() < 0.5 else [rival.raw]
        # To some the one branch, to others both.
        before = [entry.raw for entry in entries if entry.index < at.index]
        self._tell_raws(*(before if choice.random() < 0.5 else [entry.raw for entry in entries]), *branch)

    def _replay(self) -> None:
        choice = self._simulation.choice
        raws, _ = self._node.ledger.missing({}, 1 << 30)
        chosen = choice.choices(raws, k=min(len(raws), 20)) if raws else []
        self._tell_raws(*chosen)

    def _write_for_a_foreign_pod(self) -> None:
        key, now_ms = self._node.key, self._node.now_ms()
        body = Disputed(bytes(16), DisputeReason.TERMS)
        entry = sign_entry(b"Q" * 32, key.public, 0, FIRST_PREV_HASH, now_ms, body, key.sign)
        session = self._session(self._node)
        foreign = self._signed(session, Work(10, 0, 5), pod=b"Q" * 32)
        hold = self._next(self._simulation.hold(self._node, session))
        settled = self._sign(hold.index + 1, hold.hash, HoldSettled(session.id, 10, 0, 5, (foreign,)))
        self._tell_forbidden(entry)
        self._write(hold)
        self._tell_forbidden(settled)

    def _write_what_breaks_a_rule(self) -> None:
        victim, choice = self._victim(), self._simulation.choice
        bodies: list[Body] = [
            Issued(10**12),
            Transferred(TREASURY, self._node.member, 10**9),
            Transferred(self._node.member, self._node.member, 10**9),
            HoldVoided(choice.randbytes(16), VoidReason.FAILED),
            HoldSettled(choice.randbytes(16), 1, 0, 1, ()),
            AccountOpened(key_of("nobody").public, 1),
            AccountOpened(self._node.member, 77),
        ]
        if victim.member != self._node.member:
            bodies.append(Transferred(victim.member, self._node.member, 10**9))
        bodies += [
            HoldVoided(hold.session, VoidReason.CANCELLED)
            for hold in self._node.ledger.open_holds()
            if hold.author != self._node.key.public
        ]
        self._tell_forbidden(self._next(choice.choice(bodies)))

    def _settle_wrong_sums(self) -> None:
        session, choice = self._session(self._node), self._simulation.choice
        hold = self._next(self._simulation.hold(self._node, session))
        work = Work(10, 0, 20)
        wrong: list[SignedReceipt] = [
            self._signed(session, work, amount_microcredits=work.price() + 1),
            self._signed(session, work, amount_microcredits=work.price() - 1),
            self._signed(session, Work(10, 0, 5_000)),
            self._signed(session, work, session=choice.randbytes(16)),
            self._signed(session, work, stage=self._victim().key.public),
            self._signed(session, work, rate_card_version=9),
        ]
        self._write(hold)
        lie: Body = HoldSettled(session.id, 10, 0, 20, (choice.choice(wrong),))
        if choice.random() < 0.2:
            lie = ReceiptClaimed(
                replace(self._signed(session, work, stage=self._victim().key.public), stage_signature=b"")
            )
        self._tell_forbidden(self._sign(hold.index + 1, hold.hash, lie))

    def _sign_above_the_work(self) -> None:
        """A stage is asked to sign, and given reason to claim, what it did not do."""
        stage = self._victim()
        session = self._session(stage)
        receipt = self._simulation.receipt(self._node, session, 0, Work(10, 0, 70))
        asked = sign_as_head(receipt, self._node.key.sign)
        self._write(self._next(self._simulation.hold(self._node, session)))
        self._simulation.send("receipt", self._node.number, stage.number, asked.encode())
        self._write(self._next(HoldSettled(session.id, 10, 0, 70, ())))

    def _hold_too_little(self) -> None:
        """Two stages work, each for less than the hold, both together for more; neither is settled."""
        stages = [self._victim(), self._victim()]
        session, work = self._session(*stages), Work(10, 0, 50)
        hold = replace(self._simulation.hold(self._node, session), amount_microcredits=work.price() * 6 // 5)
        entry = self._next(hold)
        self._write(entry)
        if self._node.ledger.session(self._node.key.public, session.id) is None:
            return
        self._simulation.truth.held[self._node.key.public, session.id] = hold.amount_microcredits
        for index, stage in enumerate(stages):
            self._simulation.truth.work[self._node.key.public, session.id, index, stage.key.public] = work
            receipt = self._simulation.receipt(self._node, session, index, work)
            asked = sign_as_head(receipt, self._node.key.sign).encode()
            self._simulation.send("receipt", self._node.number, stage.number, asked)
        self._write(self._next(HoldSettled(session.id, 10, 0, 50, ())))

    def _claim_unsigned_work(self) -> None:
        """As a stage: more than the head signed, and receipts that no head signed at all."""
        choice = self._simulation.choice
        held = list(self._node.held.values())
        if held and choice.random() < 0.7:
            genuine = choice.choice(held)
            receipt = replace(genuine.receipt, sequence=genuine.receipt.sequence + 5)
            more = Work(receipt.num_prompt_tokens, receipt.num_cached_tokens, 75)
            receipt = replace(receipt, num_output_tokens=75, amount_microcredits=more.price())
            forged = replace(genuine, receipt=receipt)
        else:
            hold = next(iter(self._node.ledger.open_holds()), None)
            if hold is None or hold.author == self._node.key.public:
                return
            session = Session(hold.session, hold.payer, (self._node.number,), 10, 0, sequence=99)
            head = self._simulation.nodes[self._simulation.numbers[hold.author]]
            receipt = self._simulation.receipt(head, session, 0, Work(10, 0, 3))
            forged = SignedReceipt(receipt, self._node.key.sign(b"not the head"))
        # With the head's entries, so that it is not the missing hold that gives it away.
        claim = self._next(ReceiptClaimed(forged))
        self._simulation.truth.forbidden.add(claim.hash)
        self._tell_raws(*self._node.ledger.missing({}, 1 << 30)[0], claim.raw)

    def _collude(self) -> None:
        """Work that nobody did, paid by its own member to an accomplice."""
        accomplice = self._accomplice()
        session = self._session(accomplice)
        receipt = self._simulation.receipt(self._node, session, 0, Work(10, 0, 80))
        signed = co_sign(sign_as_head(receipt, self._node.key.sign), accomplice.key.sign)
        hold = self._next(self._simulation.hold(self._node, session))
        self._write(hold)
        self._write(self._next(HoldSettled(session.id, 10, 0, 80, (signed,))))

    def _hijack_a_hold(self) -> None:
        """On another member's account: without a key, and with one that was shown for another hold."""
        victim, choice = self._victim(), self._simulation.choice
        if victim.member == self._node.member:
            return
        session = replace(self._session(self._node), payer=victim.member)
        hold = replace(self._simulation.hold(self._node, session), authorization=b"")
        shown = [
            decode_entry(raw).body
            for raw in self._node.ledger.missing({}, 1 << 30)[0]
            if isinstance(decode_entry(raw).body, HoldOpened)
        ]
        others = [body.authorization for body in shown if isinstance(body, HoldOpened) and body.authorization]
        if others:
            hold = replace(hold, authorization=choice.choice(others))
        self._tell_forbidden(self._next(hold))

    def _resolve_twice(self) -> None:
        session = self._session(self._node)
        hold = self._next(self._simulation.hold(self._node, session))
        self._write(hold)
        signed = self._signed(session, Work(10, 0, 20))
        endings: list[Body] = [
            HoldVoided(session.id, VoidReason.FAILED),
            HoldSettled(session.id, 10, 0, 20, (signed,)),
            HoldVoided(session.id, VoidReason.CANCELLED),
        ]
        for body in self._simulation.choice.sample(endings, 2):
            self._write(self._next(body))

    def _travel_in_time(self) -> None:
        choice = self._simulation.choice
        time_ms = choice.choice(
            [0, self._node.now_ms() - 10**10, self._node.now_ms() + 10**10, MAX_TIME_MS - 1]
        )
        session = self._session(self._node)
        hold = self._simulation.hold(self._node, session)
        bodies: list[Body] = [
            AccountOpened(self._node.member, 1),
            replace(hold, expires_at_ms=time_ms + 1),
            replace(hold, expires_at_ms=MAX_TIME_MS),
            Disputed(session.id, DisputeReason.TERMS),
        ]
        entry = self._next(choice.choice(bodies), time_ms)
        self._write(entry)
        self._tell()
        # Over before it began.
        self._tell_forbidden(self._next(replace(hold, expires_at_ms=time_ms), time_ms))

    def _let_strangers_write(self) -> None:
        stranger = key_of(f"stranger {self._simulation.choice.randrange(3)}")
        now_ms = self._node.now_ms()
        body = Disputed(bytes(16), DisputeReason.TERMS)
        entry = sign_entry(POD, stranger.public, 0, FIRST_PREV_HASH, now_ms, body, stranger.sign)
        self._tell_forbidden(entry)

    def _write_as_another(self) -> None:
        """The next entry in an honest node's journal, signed with the wrong key."""
        victim, key = self._victim().key, self._node.key
        last = self._node.ledger.heads().get(victim.public)
        if last is not None:
            place = (last[-1].index + 1, last[-1].hash)
            body = Disputed(bytes(16), DisputeReason.TERMS)
            entry = sign_entry(POD, victim.public, *place, self._node.now_ms(), body, key.sign)
            self._simulation.truth.forbidden.add(entry.hash)
            self._tell_raws(*self._node.ledger.missing({}, 1 << 30)[0], entry.raw)

    def _send_noise(self) -> None:
        choice, send, me = self._simulation.choice, self._simulation.send, self._node.number
        entry = self._next(Issued(1))
        longer = canonical.encode(
            (1, POD, entry.author, entry.index, entry.prev_hash, 2, {0: 0, 1: 1, 2: b"x" * 65}, bytes(64))
        )
        noise = [
            ("batch", choice.randbytes(200)),
            ("batch", sync.encode_batch([choice.randbytes(300), b"", longer, bytes(60_000)])),
            ("batch", sync.encode_batch([b"x" * 70_000])),
            ("heads", choice.randbytes(100)),
            ("heads", sync.encode_heads({choice.randbytes(32): (Tip(2**62, choice.randbytes(32)),)})),
        ]
        kind, payload = choice.choice(noise)
        send(kind, me, self._other().number, payload)

    def _boast(self) -> None:
        """Heads it does not have, of authors that exist, so that others answer something useless."""
        choice = self._simulation.choice
        authors = [node.key.public for node in self._simulation.nodes]
        heads = {author: (Tip(choice.choice([0, 3, 2**62]), choice.randbytes(32)),) for author in authors}
        self._simulation.send("heads", self._node.number, self._other().number, sync.encode_heads(heads))
