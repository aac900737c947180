"""Pods of several nodes: joining, gossip, removal and reconnecting, in memory and over real libp2p."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pod.admission import JoinError
from pod.control import ControlError
from pod.invite import InviteError
from pod.membership import Membership, MembershipError
from pod.memory_control import MemoryNetwork
from pod.roster.events import KeyIssued, MemberRemoved, PolicySet, Role
from tests.pod.machines import Machines, play
from tests.pod.waiting import until

Network = Callable[[], MemoryNetwork | None]


@pytest.fixture(params=["memory", "libp2p"])
def network(request: pytest.FixtureRequest) -> MemoryNetwork | None:
    return MemoryNetwork() if request.param == "memory" else None


def agree(*nodes: Membership) -> bool:
    return len({node._log.digest() for node in nodes}) == 1


def all_live(*nodes: Membership) -> bool:
    return all(node.live() == {other.node_id for other in nodes} - {node.node_id} for node in nodes)


def test_three_join_and_all_hold_the_same_roster_and_hear_each_other(
    tmp_path: Path, network: MemoryNetwork | None
) -> None:
    async def scenario(machines: Machines) -> None:
        olga, mark, mira = await machines.pod_of("olga", "mark", "mira")
        await until(lambda: agree(olga, mark, mira) and all_live(olga, mark, mira))
        assert {m.name for m in mira.roster.members.values()} == {"olga", "mark", "mira"}
        assert mark.roster.node_named("mark-pc") is not None
        for node, body in ((olga, b"1"), (mark, b"2"), (mira, b"3")):
            node.publish_advert(body)
        await until(
            lambda: all([a.body for a in n.adverts().values()].count(b"") == 0 for n in (olga, mark, mira))
        )
        await until(lambda: all(len(n.adverts()) == 3 for n in (olga, mark, mira)))
        mark.issue(PolicySet(b"ignored: a member"))
        olga.issue(PolicySet(b"rules"))
        await until(lambda: mira.roster.policy == b"rules" and agree(olga, mark, mira))

    play(tmp_path, scenario, network)


def test_everything_is_still_there_offline_and_events_can_be_issued_there(
    tmp_path: Path, network: MemoryNetwork | None
) -> None:
    async def scenario(machines: Machines) -> None:
        olga, mark = await machines.pod_of("olga", "mark")
        await machines.down("olga")
        await machines.down("mark")
        offline = Membership.open(machines.home("olga"))
        assert offline.roster == mark.roster
        invite = offline.invite()
        assert invite.addresses
        offline.issue(KeyIssued(b"i" * 16, "laptop", 0))
        await machines.up(offline, listen=olga.addresses()[0].partition("/p2p/")[0])
        await machines.up(Membership.open(machines.home("mark")))
        await until(lambda: invite.key.public in machines.running["mark"].roster.invites, within_s=8)

    play(tmp_path, scenario, network)


async def refusal(machines: Machines, name: str, text: str) -> str:
    with pytest.raises((JoinError, InviteError)) as refused:
        await machines.join(name, text)
    assert not (machines.home(name) / "roster.log").exists()
    assert not (machines.home(name) / "keys").exists()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_every_refused_invite_says_why_and_changes_nothing(
    tmp_path: Path, network: MemoryNetwork | None
) -> None:
    async def scenario(machines: Machines) -> None:
        olga = await machines.create("olga")
        used = olga.invite().text()
        await machines.join("mark", used)
        assert "already used" in await refusal(machines, "late", used)
        revoked = olga.invite()
        olga.revoke_invite(revoked.key.public)
        assert "revoked" in await refusal(machines, "late", revoked.text())
        expiring = olga.invite(expires_s=60).text()
        machines.skew_ms["olga"] = 120_000
        assert "expired" in await refusal(machines, "late", expiring)
        machines.skew_ms["olga"] = 0
        text = olga.invite().text()
        assert "damaged" in await refusal(machines, "late", text[:-9])
        assert "taken" in str(await refusal_of_name(machines, text))
        other = await machines.create("otto")
        foreign = other.invite(addresses=[olga.addresses()[0]]).text()
        assert "not for its pod" in await refusal(machines, "late", foreign)
        await machines.down("olga")
        await machines.down("mark")
        reason = await refusal(machines, "late", text)
        assert olga.addresses()[0] in reason
        assert "could be reached" in reason

    play(tmp_path, scenario, network)


async def refusal_of_name(machines: Machines, text: str) -> JoinError:
    with pytest.raises(JoinError) as refused:
        await Membership.join(
            machines.home("new"), text, "mark", "pc", make_transport=machines.make_transport
        )
    return refused.value


def test_the_admitting_nodes_clock_judges_the_expiry_not_the_joiners(
    tmp_path: Path, network: MemoryNetwork | None
) -> None:
    async def scenario(machines: Machines) -> None:
        olga = await machines.create("olga")
        machines.skew_ms["mark"] = 7 * 24 * 3_600_000
        mark = await machines.join("mark", olga.invite().text())
        assert mark.role is Role.MEMBER

    play(tmp_path, scenario, network)


def test_a_join_costs_one_round_trip(tmp_path: Path) -> None:
    async def scenario(machines: Machines) -> None:
        olga = await machines.create("olga")
        text = olga.invite().text()
        requests: list[str] = []
        make = machines.make_transport

        def counting(key, listen):  # type: ignore[no-untyped-def]
            transport = make(key, listen)
            request = transport.request

            async def counted(peer: bytes, kind: str, payload: bytes, timeout_s: float) -> bytes:
                requests.append(kind)
                return await request(peer, kind, payload, timeout_s)

            transport.request = counted
            return transport

        await Membership.join(machines.home("mark"), text, "mark", "pc", make_transport=counting)
        assert requests == ["join"]

    play(tmp_path, scenario)


@pytest.mark.parametrize("failure", [ControlError("no answer"), asyncio.CancelledError()])
def test_a_join_whose_answer_was_lost_can_be_repeated(
    tmp_path: Path, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pod.admission.MAX_REPEAT_S", 0)

    async def scenario(machines: Machines) -> None:
        olga = await machines.create("olga")
        text = olga.invite().text()
        make = machines.make_transport

        def deaf(key, listen):  # type: ignore[no-untyped-def]
            transport = make(key, listen)
            request = transport.request

            async def lost(peer: bytes, kind: str, payload: bytes, timeout_s: float) -> bytes:
                await request(peer, kind, payload, timeout_s)
                raise failure

            transport.request = lost
            return transport

        with pytest.raises((JoinError, asyncio.CancelledError)):
            await Membership.join(machines.home("mark"), text, "mark", "pc", make_transport=deaf)
        mark = await machines.join("mark", text)
        assert mark.role is Role.MEMBER
        assert len(olga.roster.members) == 2

    play(tmp_path, scenario, MemoryNetwork())


def test_a_one_use_invite_redeemed_on_both_sides_of_a_partition_has_one_winner(tmp_path: Path) -> None:
    network = MemoryNetwork()

    async def scenario(machines: Machines) -> None:
        olga, mark = await machines.pod_of("olga", "mark")
        invite = olga.invite(addresses=[*olga.addresses(), *mark.addresses()])
        await until(lambda: agree(olga, mark))
        network.partition(frozenset({olga.node_id}), frozenset({mark.node_id}))
        await until(lambda: not olga.live() and not mark.live())
        lena = await machines.join("lena", invite.text())
        network.partition(frozenset({olga.node_id, lena.node_id}), frozenset({mark.node_id}))
        by_mark = mark.invite  # mark is no admin: he may admit, not invite
        with pytest.raises(MembershipError, match="role"):
            by_mark()
        lars = await machines.join("lars", swapped(invite, mark))
        told: list[str] = []
        lena.on_self_removed(lambda: told.append("lena"))
        lars.on_self_removed(lambda: told.append("lars"))
        network.partition()
        await until(lambda: agree(olga, mark), within_s=10)
        names = {member.name for member in olga.roster.members.values()}
        assert names in ({"olga", "mark", "lena"}, {"olga", "mark", "lars"})
        (loser,) = {"lena", "lars"} - names
        assert [join.name for join in olga.roster.lost_joins] == [loser]
        assert olga.roster == mark.roster
        await until(lambda: told == [loser], within_s=10)

    play(tmp_path, scenario, network)


def swapped(invite, node):  # type: ignore[no-untyped-def]
    """The same invite with other addresses first, as its issuer would print it."""
    from dataclasses import replace

    from pod.invite import signed_invite
    from tests.pod.people import key_of

    fresh = replace(invite, addresses=tuple(node.addresses()), issued_by=key_of("whoever").public)
    return signed_invite(fresh, key_of("whoever").sign).text()


def test_a_removed_node_learns_it_and_is_cut_off_everywhere_within_two_seconds(
    tmp_path: Path, network: MemoryNetwork | None
) -> None:
    async def scenario(machines: Machines) -> None:
        olga, mark, mira = await machines.pod_of("olga", "mark", "mira")
        await until(lambda: agree(olga, mark, mira) and all_live(olga, mark, mira))
        told: list[bool] = []
        mark.on_self_removed(lambda: told.append(True))
        started_s = time.monotonic()
        olga.remove_member(mark.member_id)
        for other in (olga, mira):
            transport = other._transport
            assert transport is not None
            await until(lambda t=transport: mark.node_id not in t.peers(), within_s=2)
            assert mark.node_id not in other.live()
        assert time.monotonic() - started_s < 2
        await until(lambda: told == [True])
        assert mark.role is None
        with pytest.raises(ControlError):
            await mark.request(olga.node_id, "beat", b"", 1)
        assert mira.node_id in olga.live()

    play(tmp_path, scenario, network)


def test_who_may_not_remove_is_told_so(tmp_path: Path) -> None:
    async def scenario(machines: Machines) -> None:
        olga, mark = await machines.pod_of("olga", "mark")
        with pytest.raises(MembershipError, match="role"):
            mark.remove_member(olga.member_id)
        with pytest.raises(MembershipError, match="no such member"):
            olga.remove_member(bytes(32))
        with pytest.raises(MembershipError, match="owner cannot leave"):
            await olga.leave()
        assert await mark.leave()
        await until(lambda: mark.member_id not in olga.roster.members)
        assert await mark.leave()

    play(tmp_path, scenario, MemoryNetwork())


def test_backdated_events_of_a_removed_member_change_nothing_on_any_node(tmp_path: Path) -> None:
    async def scenario(machines: Machines) -> None:
        olga, adam, mark = await machines.pod_of("olga", "adam", "mark", role=Role.ADMIN)
        await until(lambda: agree(olga, adam, mark))
        kept = tuple(e.hash for e in olga._log.events() if e.author == adam.member_id)
        olga.issue(MemberRemoved(adam.member_id, kept))
        from pod.roster.events import sign_event

        backdated = sign_event(
            PolicySet(b"mine"), olga.pod, adam.member_id, adam.member_key.sign, 2, adam._clock_ms() - 10**6
        )
        mark._log.add(backdated)
        mark._roster_changed()
        await until(lambda: agree(olga, mark))
        assert olga.roster.policy is None
        assert olga.roster == mark.roster

    play(tmp_path, scenario, MemoryNetwork())


def test_peers_find_each_other_again_after_a_restart_on_another_port(
    tmp_path: Path, network: MemoryNetwork | None
) -> None:
    async def scenario(machines: Machines) -> None:
        olga, mark, mira = await machines.pod_of("olga", "mark", "mira")
        await until(lambda: all_live(olga, mark, mira))
        await machines.down("mark")
        await until(lambda: mark.node_id not in olga.live() | mira.live())
        again = await machines.up(Membership.open(machines.home("mark")))
        await until(lambda: all_live(olga, again, mira), within_s=5)
        await until(lambda: agree(olga, again, mira))

    play(tmp_path, scenario, network)


def test_requests_of_the_nodes_own_kinds_and_channels_pass_between_members(
    tmp_path: Path, network: MemoryNetwork | None
) -> None:
    async def scenario(machines: Machines) -> None:
        olga = await machines.create("olga")
        await machines.down("olga")
        olga = Membership.open(machines.home("olga"))

        async def bundle(peer: bytes, payload: bytes) -> bytes:
            return b"bundle of " + payload

        olga.handle("bundle", bundle)
        notes = Notes()
        olga.add_replicated(notes)
        await machines.up(olga)
        mark = await Membership.join(
            machines.home("mark"), olga.invite().text(), "mark", "pc", make_transport=machines.make_transport
        )
        copied = Notes()
        mark.add_replicated(copied)
        await machines.up(mark)
        await until(lambda: all_live(olga, mark))
        assert await mark.request(olga.node_id, "bundle", b"m", 5) == b"bundle of m"
        notes.texts |= {b"%d" % n for n in range(50)}
        olga.changed()
        await until(lambda: copied.texts == notes.texts)
        num_pulls = notes.num_asked
        await until_beats(olga, 2)
        assert notes.num_asked == num_pulls

    play(tmp_path, scenario, network)


async def until_beats(node: Membership, num_beats: int) -> None:
    """Until that many more heartbeats were heard: time for a needless pull to show."""
    gossip = node._gossip
    assert gossip is not None
    heard = []
    for _ in range(num_beats):
        before = dict(gossip._heard_s)
        await until(lambda before=before: gossip._heard_s != before)
        heard.append(before)


class Notes:
    """A Replicated channel that hands out ten texts at a time and never reveals how many there are."""

    name = "notes"

    def __init__(self) -> None:
        self.texts: set[bytes] = set()
        self.num_asked = 0

    def digest(self) -> bytes:
        import hashlib

        return hashlib.sha256(b",".join(sorted(self.texts))).digest()

    def summary(self) -> bytes:
        return b",".join(sorted(self.texts))

    def missing(self, summary: bytes) -> tuple[bytes, bool]:
        self.num_asked += 1
        lacking = sorted(self.texts - set(summary.split(b",")))
        return b",".join(lacking[:10]), len(lacking) > 10

    async def ingest(self, peer: bytes, payload: bytes) -> int:
        new = set(payload.split(b",")) - {b""} - self.texts
        self.texts |= new
        return len(new)


def test_a_home_is_in_one_pod_only_and_an_empty_one_in_none(tmp_path: Path) -> None:
    Membership.create_pod(tmp_path / "a", "alpha", "olga", "pc")
    with pytest.raises(MembershipError, match="belongs to a pod already"):
        Membership.create_pod(tmp_path / "a", "beta", "olga", "pc")
    with pytest.raises(MembershipError, match="in no pod"):
        Membership.open(tmp_path / "b")


def test_a_copied_home_running_twice_is_noticed(tmp_path: Path) -> None:
    import shutil

    async def scenario(machines: Machines) -> None:
        olga, mark = await machines.pod_of("olga", "mark")
        await until(lambda: all_live(olga, mark))
        shutil.copytree(machines.home("mark"), machines.home("copy"))
        told: list[bool] = []
        mark.on_duplicate(lambda: told.append(True))
        await machines.up(Membership.open(machines.home("copy")))
        await until(lambda: bool(told), within_s=30)

    play(tmp_path, scenario)
