"""A node that signed two histories: named to people, given no work, trusted on no link."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ledger.entry import Disputed, DisputeReason, Entry, sign_entry
from ledger.sync import encode_batch
from node.dashboard.pages import live_fragment
from node.home import PodHome
from node.ledger_channel import LedgerChannel
from node.office import Office, create_pod, open_ledger, open_membership
from node.operations.ledger import ledger_verify
from node.placement.route import NoRoute
from node.pod_state import PodState
from node.runtime import NodeRuntime
from pod.identity import KeyPair
from pod.membership import Membership
from tests.gateway.fake_backend import example_view


class Machine:
    """The owner's machine; `forger` is a node of the same pod whose key was used for two histories."""

    def __init__(self, home: PodHome, monkeypatch: pytest.MonkeyPatch) -> None:
        create_pod(home, "alpha", "olga", "desk")
        self.membership = open_membership(home)
        self.forger = KeyPair.create()
        roster = self.membership.roster
        own = roster.nodes[self.membership.node_id]
        other = replace(own, id=self.forger.public, name="shed", certificate_der=b"certificate of shed")
        self.roster = replace(roster, nodes={**roster.nodes, other.id: other})
        monkeypatch.setattr(Membership, "roster", property(lambda _: self.roster))
        self.thread = open_ledger(home, self.membership)
        self.told: list[frozenset[bytes]] = []
        self.channel = LedgerChannel(self.thread, lambda: None)
        self.channel.on_fork = lambda: self.told.append(self.thread.ledger.frozen_authors())

    def twins(self) -> list[Entry]:
        pod, sign, body = self.membership.pod, self.forger.sign, Disputed(bytes(16), DisputeReason.TERMS)
        return [sign_entry(pod, self.forger.public, 0, bytes(32), time, body, sign) for time in (1, 2)]

    def hear(self, *entries: Entry) -> None:
        asyncio.run(self.channel.ingest(b"peer", encode_batch([entry.raw for entry in entries])))

    def verify(self) -> dict[str, object]:
        office = SimpleNamespace(ledger=self.thread, membership=self.membership)
        return dict(asyncio.run(ledger_verify(as_office(office), {}, lambda _: None)))


def as_office(office: SimpleNamespace) -> Office:
    return office  # type: ignore[return-value]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(PodHome(tmp_path / "home"), monkeypatch)
    yield made
    made.thread.close()


def test_verify_names_the_node_and_its_member(machine: Machine) -> None:
    first, second = machine.twins()
    machine.hear(first)
    result = machine.verify()
    assert (result["ok"], result["frozen"], machine.told) == (True, [], [])
    machine.hear(second)
    result = machine.verify()
    assert (result["ok"], result["frozen"]) == (False, ["shed (olga)"])
    assert result["violations"] == [
        f"entry 0 of {machine.forger.public.hex()[:8]}: fork: 2 entries with this index"
    ]
    assert machine.told == [frozenset({machine.forger.public})]


def test_the_dashboard_names_it() -> None:
    view = example_view()
    assert "signed two histories" not in live_fragment(view)
    shown = live_fragment(replace(view, ledger=replace(view.ledger, frozen=("shed (<b>olga</b>)",))))
    assert "signed two histories" in shown
    assert "shed (&lt;b&gt;olga" in shown


def test_no_link_trusts_it_and_the_others_stay_trusted(machine: Machine) -> None:
    state = SimpleNamespace(frozen=frozenset())
    claims = SimpleNamespace(unpaying_heads=frozenset())
    runtime = SimpleNamespace(_membership=machine.membership, _state=state, _claims=claims)
    everybody = NodeRuntime._trusted(runtime)  # type: ignore[arg-type]
    assert b"certificate of shed" in everybody
    for place, name in ((state, "frozen"), (claims, "unpaying_heads")):
        setattr(place, name, frozenset({machine.forger.public}))
        trusted = NodeRuntime._trusted(runtime)  # type: ignore[arg-type]
        assert set(everybody) - set(trusted) == {b"certificate of shed"}
        setattr(place, name, frozenset())


def test_no_route_goes_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[frozenset[bytes]] = []
    honest, forger = b"h" * 32, b"f" * 32

    def no_view(_: PodState, live: frozenset[bytes]) -> None:
        asked.append(live)
        raise NoRoute("there is nothing to route over in this test")

    monkeypatch.setattr(PodState, "_build_view", no_view)
    live = frozenset({honest, forger})
    state = PodState(node=honest, roster=None, adverts=dict, live=lambda: live, catalogue=None)  # type: ignore[arg-type]
    state.frozen = frozenset({forger})
    for find in (state.view, lambda: state.find_route(b"m" * 32, frozenset({b"x" * 32}))):
        with pytest.raises(Exception, match="nothing to route over"):
            find()
    assert asked == [frozenset({honest})] * 2
