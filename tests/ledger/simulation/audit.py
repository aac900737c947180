"""What must hold of each node's books at every moment, and of all honest nodes' once the network healed."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ledger.entry import HoldSettled, HoldVoided, decode_entry
from ledger.session_record import SessionState
from tests.ledger.simulation.node import SimulatedNode
from tests.ledger.simulation.recount import balances_of
from tests.ledger.simulation.truth import Work

if TYPE_CHECKING:
    from tests.ledger.simulation.simulation import Simulation

NO_WORK = Work(0, 0, 0)


def check_node(simulation: Simulation, node: SimulatedNode) -> None:
    """Sums are 0, holds are above 0 and open or resolved, nobody is paid for more than was held or done."""
    books = node.ledger
    balances = books.balances()
    assert sum(balances.values()) == 0, "the accounts do not sum to 0"
    assert books.num_not_applied() == 0, "an entry was stored and not applied"
    held: Counter[bytes] = Counter()
    places = set()
    for hold in books.open_holds():
        assert hold.amount_microcredits > 0, "a hold is not above zero"
        places.add((hold.author, hold.session, hold.payer, hold.key_id))
        held[hold.payer] += hold.amount_microcredits
        summary = books.session(hold.author, hold.session)
        assert summary is not None
        assert summary.state is SessionState.OPEN, "a hold is open and its session is not"
    assert len(places) == len(books.open_holds()), "a hold is open twice"
    for member in simulation.directory.members.values():
        assert books.available(member) == balances.get(member, 0) - held[member]
    for summary in books.recent_sessions(10_000):
        head = simulation.numbers[summary.head]
        amounts = simulation.truth.held.get((summary.head, summary.session))
        paid = sum(stage.amount_microcredits for stage in summary.stages)
        assert paid == summary.amount_microcredits
        if amounts is not None:
            assert paid <= amounts, "a session paid more than its hold"
        for stage in summary.stages:
            if head in simulation.liars and simulation.numbers[stage.node] in simulation.liars:
                # Two liars may sign what they like; whose account it is on is checked by the totals.
                continue
            place = (summary.head, summary.session, stage.stage_index, stage.node)
            done = simulation.truth.work.get(place, NO_WORK)
            assert stage.num_prompt_tokens <= done.num_prompt_tokens, "prompt tokens above the work"
            assert stage.num_output_tokens <= done.num_output_tokens, "output tokens above the work"
            assert stage.amount_microcredits <= done.price(), "an amount above the work"


def check_nothing_is_half_done(node: SimulatedNode) -> None:
    """After a write that failed the books are those of what is stored."""
    before = node.ledger.digest(), node.ledger.balances(), node.ledger.open_holds()
    node.ledger.rebuild()
    assert before == (node.ledger.digest(), node.ledger.balances(), node.ledger.open_holds())


def check_all_equal(simulation: Simulation) -> None:
    """After healing: equal books, sound journals, nothing lost, every fork known, nobody robbed."""
    honest = simulation.honest()
    for node in honest:
        check_node(simulation, node)
    states = [_state(simulation, node) for node in honest]
    assert all(state == states[0] for state in states), "honest nodes are not equal"
    for node, state in zip(honest, states, strict=True):
        node.start()
        assert _state(simulation, node) == state, "a restart changes the books"
    _check_journal(simulation, honest[0])
    balances = {account: balance for account, balance in honest[0].ledger.balances().items() if balance}
    assert balances == balances_of(honest[0].ledger, simulation.directory.members), "counted again: other"
    _check_frozen(simulation, honest[0])
    _check_nobody_is_robbed(simulation, honest[0])
    _check_verdicts(simulation)


def _state(simulation: Simulation, node: SimulatedNode) -> object:
    books = node.ledger
    # With one clock for all: states and availability depend on the time.
    skew_ms, node.skew_ms = node.skew_ms, 0
    try:
        return (
            books.digest(),
            books.balances(),
            books.member_totals(),
            sorted((hold.author, hold.session, hold.payer, hold.key_id) for hold in books.open_holds()),
            books.forks(),
            [books.is_frozen(other.key.public) for other in simulation.nodes],
            {(summary.head, summary.session): summary for summary in books.recent_sessions(10_000)},
        )
    finally:
        node.skew_ms = skew_ms


def _check_journal(simulation: Simulation, node: SimulatedNode) -> None:
    raws, has_more = node.ledger.missing({}, 1 << 30)
    assert not has_more
    entries = [decode_entry(raw) for raw in raws]
    hashes = {entry.hash for entry in entries}
    assert not hashes & simulation.truth.forbidden, "an entry was taken in that breaks a rule"
    liars = {simulation.nodes[number].key.public for number in simulation.liars}
    gone = {simulation.nodes[number].key.public for number in simulation.gone}
    known = {other.key.public for other in simulation.nodes}
    assert {entry.author for entry in entries} <= known, "an entry of a stranger"
    there = {other.key.public for other in simulation.honest()}
    promised = {hash_ for author, hash_ in simulation.truth.promised if author in there}
    assert promised <= hashes, "an entry that was reported durable is gone"
    resolutions = Counter(
        (entry.author, entry.body.session)
        for entry in entries
        if isinstance(entry.body, HoldSettled | HoldVoided) and entry.author not in liars | gone
    )
    assert set(resolutions.values()) <= {1}, "an honest head resolved a hold twice"
    assert not [hold for hold in node.ledger.open_holds() if hold.author not in liars | gone]


def _check_frozen(simulation: Simulation, node: SimulatedNode) -> None:
    """Exactly the authors of whom two entries at one place reached an honest node."""
    forked = {fork.author for fork in node.ledger.forks()}
    liars = {simulation.nodes[number].key.public for number in simulation.liars}
    assert forked <= liars, "an honest author counts as forked"
    frozen = {other.key.public for other in simulation.nodes if node.ledger.is_frozen(other.key.public)}
    assert frozen == forked
    journal: Counter[tuple[bytes, int]] = Counter()
    for raw in node.ledger.missing({}, 1 << 30)[0]:
        entry = decode_entry(raw)
        journal[entry.author, entry.index] += 1
    assert {author for (author, _), number in journal.items() if number > 1} == forked


def _check_nobody_is_robbed(simulation: Simulation, node: SimulatedNode) -> None:
    """An honest member pays for what its sessions at honest heads computed, and for nothing else."""
    spent: Counter[bytes] = Counter()
    for (head, session, _, _), work in simulation.truth.work.items():
        payer = simulation.truth.payers.get((head, session))
        if payer is not None:
            spent[payer] += work.price()
    lying_members = {simulation.nodes[number].member for number in simulation.liars}
    for member, totals in node.ledger.member_totals().items():
        if member not in lying_members:
            assert totals.microcredits_spent <= spent[member], "a member paid for what it did not get"


def _check_verdicts(simulation: Simulation) -> None:
    """`pod ledger verify` names liars and nobody else; a look at one node is enough, all hold the same."""
    liars = {simulation.nodes[number].key.public for number in simulation.liars}
    node = simulation.honest()[0]
    violations = node.ledger.verify()
    assert {violation.author for violation in violations} <= liars, violations
    named = {violation.author for violation in violations if "fork" in violation.reason}
    assert named == {fork.author for fork in node.ledger.forks()}, "a fork is not named"
