"""Who signs for whom in a pod of several nodes: the owner's, admins', nobody, and after changes of roles."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from node.errors import UserError
from node.tls import certificates
from node.tls.authority import CERTIFICATE_KIND, ISSUER_KIND, Authority
from node.tls.certificates import DAY_MS, SERVER_DAYS, CertifiedKey, check_chain, new_key, request_of
from node.tls.pod_certificate import PodCertificate
from node.tls.shown import Source
from pod.canonical import encode
from pod.control import ControlError
from pod.membership import Membership
from pod.memory_control import MemoryNetwork
from pod.roster.events import AuthoritySet, Role
from tests.pod.machines import Machines, play
from tests.pod.waiting import until

NAMES = ["gw1", "10.0.0.5"]


@dataclass
class Person:
    membership: Membership
    authority: Authority
    certificate: PodCertificate

    @property
    def source(self) -> Source | None:
        return self.certificate.shown.source if self.certificate.shown is not None else None


async def start(machines: Machines, name: str, membership: Membership) -> Person:
    keys, clock = machines.home(name) / "keys", machines.clock(name)
    authority = Authority(membership, keys, clock)
    authority.handle_requests()
    await machines.up(membership)
    authority.ensure()
    certificate = PodCertificate(authority, keys / "https.pem", "alpha", lambda: NAMES, clock)
    return Person(membership, authority, certificate)


async def create(machines: Machines, name: str) -> Person:
    home = machines.home(name)
    made = Membership.create_pod(home, "alpha", name, f"{name}-pc", machines.clock(name))
    return await start(machines, name, made)


async def join(machines: Machines, first: Person, name: str, role: Role = Role.MEMBER) -> Person:
    text = first.membership.invite(role).text()
    joined = await Membership.join(
        machines.home(name), text, name, f"{name}-pc", machines.clock(name), machines.make_transport
    )
    person = await start(machines, name, joined)
    await until(lambda: first.membership.node_id in person.membership.live())
    await until(lambda: person.authority.certificate_der is not None)
    return person


Scenario = Callable[[Machines], Awaitable[None]]


def play_in_memory(tmp_path: Path, scenario: Scenario) -> None:
    play(tmp_path, scenario, MemoryNetwork())


def test_the_owners_node_signs_for_the_others_over_the_real_network(tmp_path: Path) -> None:
    async def scenario(machines: Machines) -> None:
        olga = await create(machines, "olga")
        olga.certificate.start()
        assert olga.source is Source.POD
        mark = await join(machines, olga, "mark")
        assert mark.authority.certificate_der == olga.authority.certificate_der
        mark.certificate.start()
        assert mark.source is Source.SELF_SIGNED
        assert "no node that signs" in mark.certificate.shown.note
        await mark.certificate.refresh()
        assert mark.source is Source.POD
        assert mark.certificate.shown.note == ""
        # It is kept: another start needs nobody.
        before = mark.certificate.shown.certificate
        again = PodCertificate(
            mark.authority, machines.home("mark") / "keys" / "https.pem", "alpha", lambda: NAMES, lambda: 0
        )
        again._clock_ms = machines.clock("mark")
        again.start()
        assert again.shown.certificate == before
        assert not (machines.home("mark") / "keys" / "authority.pem").exists()

    play(tmp_path, scenario, None)


def test_an_admins_node_signs_while_the_owners_machine_is_off(tmp_path: Path) -> None:
    async def scenario(machines: Machines) -> None:
        olga = await create(machines, "olga")
        anna = await join(machines, olga, "anna", Role.ADMIN)
        await anna.authority.refresh_issuer()
        mark = await join(machines, olga, "mark")
        await until(lambda: anna.membership.node_id in mark.membership.live())
        await machines.down("olga")
        await until(lambda: olga.membership.node_id not in mark.membership.live(), within_s=10)
        for person, num_in_chain in ((mark, 2), (anna, 2)):
            person.certificate.start()
            await person.certificate.refresh()
            assert person.source is Source.POD
            held = CertifiedKey.load(machines.home(person.membership.directory.name) / "keys" / "https.pem")
            assert held is not None
            assert len(held.chain) == num_in_chain
            check_chain(held.chain, olga.authority.certificate_der, machines.clock("mark")())
        assert not (machines.home("anna") / "keys" / "authority.pem").exists()

    play_in_memory(tmp_path, scenario)


def test_with_nobody_who_signs_it_shows_its_own_and_asks_again(tmp_path: Path) -> None:
    async def scenario(machines: Machines) -> None:
        olga = await create(machines, "olga")
        mark = await join(machines, olga, "mark")
        await machines.down("olga")
        await until(lambda: not mark.membership.live(), within_s=10)
        mark.certificate.start()
        await mark.certificate.refresh()
        assert mark.source is Source.SELF_SIGNED
        assert mark.certificate.is_wanting
        own = mark.certificate.shown.certificate
        await mark.certificate.refresh()
        assert mark.certificate.shown.certificate == own
        await start(machines, "olga", Membership.open(machines.home("olga"), machines.clock("olga")))
        await until(lambda: bool(mark.membership.live()), within_s=10)
        await mark.certificate.refresh()
        assert mark.source is Source.POD

    play_in_memory(tmp_path, scenario)


def test_renewed_at_half_its_time_and_for_new_names(tmp_path: Path) -> None:
    async def scenario(machines: Machines) -> None:
        olga = await create(machines, "olga")
        olga.certificate.start()
        first = olga.certificate.shown.certificate
        await olga.certificate.refresh()
        assert olga.certificate.shown.certificate == first
        machines.skew_ms["olga"] = (SERVER_DAYS // 2 + 1) * DAY_MS
        await olga.certificate.refresh()
        second = olga.certificate.shown.certificate
        assert second.not_valid_after_utc > first.not_valid_after_utc
        olga.certificate._names = lambda: [*NAMES, "gw2", "gpu.example.com"]
        await olga.certificate.refresh()
        shown = olga.certificate.shown
        assert "gw2" in shown.as_json()["names"]
        assert "gpu.example.com" in shown.note

    play_in_memory(tmp_path, scenario)


def test_a_new_authority_takes_the_place_of_the_old_one_everywhere(tmp_path: Path) -> None:
    async def scenario(machines: Machines) -> None:
        olga = await create(machines, "olga")
        mark = await join(machines, olga, "mark")
        mark.certificate.start()
        await mark.certificate.refresh()
        old = olga.authority.certificate_der
        with pytest.raises(UserError, match="only the pod's owner"):
            mark.authority.renew()
        olga.authority.renew()
        await until(lambda: mark.authority.certificate_der not in (None, old))
        assert mark.source is Source.SELF_SIGNED or mark.certificate.is_wanting
        await mark.certificate.refresh()
        assert mark.source is Source.POD

    play_in_memory(tmp_path, scenario)


def test_who_may_not_sign_does_not(tmp_path: Path) -> None:
    async def scenario(machines: Machines) -> None:
        olga = await create(machines, "olga")
        anna = await join(machines, olga, "anna", Role.ADMIN)
        mark = await join(machines, olga, "mark")
        await until(lambda: len(mark.membership.live()) == len(olga.membership.live()) == 2)
        csr = request_of(new_key(), NAMES)
        owner, member = olga.membership.node_id, mark.membership.node_id
        for asker, asked, kind, reason in (
            (mark, owner, ISSUER_KIND, "only admins"),
            (olga, member, CERTIFICATE_KIND, "does not sign"),
            (anna, member, ISSUER_KIND, "does not hold"),
        ):
            with pytest.raises(ControlError, match=reason):
                await asker.membership.request(asked, kind, csr, 5)
        public = request_of(new_key(), ["example.com"])
        with pytest.raises(ControlError, match="public name"):
            await mark.membership.request(owner, CERTIFICATE_KIND, public, 5)
        # An authority that a member or an admin names counts for nothing.
        before = olga.authority.certificate_der
        for person in (mark, anna):
            person.membership.issue(AuthoritySet(b"mine"))
        await until(lambda: len({p.membership._log.digest() for p in (olga, anna, mark)}) == 1)
        assert {p.authority.certificate_der for p in (olga, anna, mark)} == {before}
        # An admin no more: its issuer goes.
        await anna.authority.refresh_issuer()
        assert anna.authority.signer() is not None
        olga.membership.change_role(anna.membership.member_id, Role.MEMBER)
        await until(lambda: anna.membership.role is Role.MEMBER)
        assert anna.authority.signer() is None
        await anna.authority.refresh_issuer()
        assert not (machines.home("anna") / "keys" / "issuer.pem").exists()

    play_in_memory(tmp_path, scenario)


def test_an_answer_for_another_key_is_not_taken(tmp_path: Path) -> None:
    async def scenario(machines: Machines) -> None:
        olga = await create(machines, "olga")
        mark = await join(machines, olga, "mark")
        made = olga.authority.certify_here(NAMES)
        assert made is not None

        async def replay(_peer: bytes, _csr: bytes) -> bytes:
            return await olga.authority._answer_certificate(b"", request_of(new_key(), NAMES))

        olga.membership._transport._desk._handlers[CERTIFICATE_KIND] = replay
        assert await mark.authority.certify(NAMES) is None

        async def junk(_peer: bytes, _csr: bytes) -> bytes:
            return b"\xff" * 100

        olga.membership._transport._desk._handlers[CERTIFICATE_KIND] = junk
        assert await mark.authority.certify(NAMES) is None

    play_in_memory(tmp_path, scenario)


def test_the_owners_lost_key_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(machines: Machines) -> None:
        olga = await create(machines, "olga")
        (machines.home("olga") / "keys" / "authority.pem").unlink()
        olga.authority._own = None
        olga.authority.ensure()
        assert "pod ca --renew" in caplog.text
        olga.certificate.start()
        assert olga.source is Source.SELF_SIGNED
        await asyncio.sleep(0)

    play_in_memory(tmp_path, scenario)


def test_a_garbage_authority_leaves_every_node_with_its_own(tmp_path: Path) -> None:
    async def scenario(machines: Machines) -> None:
        olga = await create(machines, "olga")
        mark = await join(machines, olga, "mark")
        for person in (olga, mark):
            person.certificate.start()
            await person.certificate.refresh()
            assert person.source is Source.POD
        olga.membership.issue(AuthoritySet(b"mine"))
        await until(lambda: mark.authority.certificate_der == b"mine")
        for name, person in (("olga", olga), ("mark", mark)):
            await person.authority.refresh_issuer()
            await person.certificate.refresh()
            assert person.source is Source.SELF_SIGNED
            file = machines.home(name) / "keys" / "https.pem"
            again = PodCertificate(person.authority, file, "alpha", lambda: NAMES, machines.clock(name))
            again.start()
            assert again.is_wanting

    play_in_memory(tmp_path, scenario)


def test_an_answer_for_other_names_is_not_taken(tmp_path: Path) -> None:
    async def scenario(machines: Machines) -> None:
        olga = await create(machines, "olga")
        mark = await join(machines, olga, "mark")
        own = olga.authority.signer()
        assert own is not None

        async def other_names(_peer: bytes, csr: bytes) -> bytes:
            public = certificates._public_key(certificates._read_request(csr))
            now_ms = machines.clock("olga")()
            subject, signer = own.certificate.subject, own.key.public_key()
            builder = certificates._server_builder(
                "alpha", ["elsewhere"], subject, public, signer, now_ms, now_ms + DAY_MS
            )
            return encode([builder.sign(own.key, hashes.SHA256()).public_bytes(Encoding.DER)])

        olga.membership._transport._desk._handlers[CERTIFICATE_KIND] = other_names
        assert await mark.authority.certify(NAMES) is None
        assert await mark.authority.certify(["elsewhere"]) is not None

    play_in_memory(tmp_path, scenario)
