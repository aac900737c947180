"""One contract for every control transport: in memory and over real libp2p on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pod.control import JOIN_KIND, MAX_PAYLOAD_BYTES, ControlError, ControlTransport, RefusedError
from pod.identity import KeyPair
from pod.memory_control import MemoryControl, MemoryNetwork
from pod.p2p.transport import LibP2PControl
from tests.pod.people import key_of
from tests.pod.waiting import until

Scenario = Callable[["Ends"], Awaitable[None]]
Play = Callable[[Scenario], None]
LOOPBACK = "/ip4/127.0.0.1/tcp/0"


class Ends:
    """Transports of one kind, made by the name of their key, all stopped at the end."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._network = MemoryNetwork()
        self._made: list[ControlTransport] = []

    async def make(self, name: str) -> ControlTransport:
        key = key_of(name)
        transport = self._transport(key)
        await transport.start()
        self._made.append(transport)
        return transport

    async def pair(self) -> tuple[ControlTransport, ControlTransport]:
        """Two nodes of one pod, connected."""
        one, other = await self.make("one"), await self.make("other")
        nodes = frozenset({one.node_id, other.node_id})
        for transport in (one, other):
            transport.set_allowed(nodes, frozenset())
        await one.connect(other.node_id, other.listen_addresses(), 5)
        await until(lambda: one.node_id in other.peers())
        return one, other

    async def stop(self) -> None:
        for transport in self._made:
            await transport.stop()

    def _transport(self, key: KeyPair) -> ControlTransport:
        if self._kind == "memory":
            return MemoryControl(self._network, key.public)
        return LibP2PControl(key, [LOOPBACK])


@pytest.fixture(params=["memory", "libp2p"])
def play(request: pytest.FixtureRequest) -> Play:
    def run(scenario: Scenario) -> None:
        async def whole() -> None:
            ends = Ends(request.param)
            try:
                await asyncio.wait_for(scenario(ends), 30)
            finally:
                await ends.stop()

        asyncio.run(whole())

    return run


async def echo(peer: bytes, payload: bytes) -> bytes:
    return peer + payload


def test_requests_go_both_ways_over_one_connection_and_name_the_asker(
    play: Callable[[Scenario], None],
) -> None:
    async def scenario(ends: Ends) -> None:
        one, other = await ends.pair()
        one.handle("echo", echo)
        other.handle("echo", echo)
        assert await one.request(other.node_id, "echo", b"a", 5) == one.node_id + b"a"
        assert await other.request(one.node_id, "echo", b"b", 5) == other.node_id + b"b"
        answers = await asyncio.gather(
            *(one.request(other.node_id, "echo", bytes([n]), 5) for n in range(50))
        )
        assert answers == [one.node_id + bytes([n]) for n in range(50)]
        assert one.peers() == {other.node_id}

    play(scenario)


def test_the_largest_payload_passes_and_a_larger_one_is_refused_here(
    play: Callable[[Scenario], None],
) -> None:
    async def scenario(ends: Ends) -> None:
        one, other = await ends.pair()

        async def same(_: bytes, payload: bytes) -> bytes:
            return payload

        async def too_much(_: bytes, payload: bytes) -> bytes:
            return payload + b"!"

        other.handle("same", same)
        other.handle("too much", too_much)
        largest = bytes(range(256)) * (MAX_PAYLOAD_BYTES // 256)
        assert await one.request(other.node_id, "same", largest, 10) == largest
        with pytest.raises(ControlError, match="too large"):
            await one.request(other.node_id, "same", largest + b"!", 5)
        with pytest.raises(RefusedError, match="too large"):
            await one.request(other.node_id, "too much", largest, 10)

    play(scenario)


def test_a_handler_that_fails_harms_nothing_else(play: Play) -> None:
    async def scenario(ends: Ends) -> None:
        one, other = await ends.pair()

        async def fails(_: bytes, __: bytes) -> bytes:
            raise ZeroDivisionError

        async def refuses(_: bytes, __: bytes) -> bytes:
            raise ControlError("the invite has expired")

        other.handle("fails", fails)
        other.handle("refuses", refuses)
        other.handle("echo", echo)
        with pytest.raises(RefusedError, match="failed there"):
            await one.request(other.node_id, "fails", b"", 5)
        with pytest.raises(RefusedError, match="the invite has expired"):
            await one.request(other.node_id, "refuses", b"", 5)
        with pytest.raises(RefusedError, match="does not answer"):
            await one.request(other.node_id, "unheard of", b"", 5)
        assert await one.request(other.node_id, "echo", b"a", 5) == one.node_id + b"a"

    play(scenario)


def test_a_late_answer_is_given_up_and_the_next_request_works(play: Play) -> None:
    async def scenario(ends: Ends) -> None:
        one, other = await ends.pair()
        release = asyncio.Event()

        async def slow(_: bytes, payload: bytes) -> bytes:
            await release.wait()
            return payload

        other.handle("slow", slow)
        other.handle("echo", echo)
        with pytest.raises(ControlError, match=r"no answer to 'slow' within 0\.1 s"):
            await one.request(other.node_id, "slow", b"", 0.1)
        release.set()
        assert await one.request(other.node_id, "echo", b"a", 5) == one.node_id + b"a"

    play(scenario)


def test_peers_come_and_go_and_requests_to_them_fail_at_once(play: Play) -> None:
    async def scenario(ends: Ends) -> None:
        one, other = await ends.make("one"), await ends.make("other")
        seen: list[tuple[bytes, bool]] = []
        one.on_peer(lambda peer, up: seen.append((peer, up)))
        for transport in (one, other):
            transport.set_allowed(frozenset({one.node_id, other.node_id}), frozenset())
        with pytest.raises(ControlError, match="not connected"):
            await one.request(other.node_id, "echo", b"", 5)
        await one.connect(other.node_id, other.listen_addresses(), 5)
        asked = asyncio.Event()

        async def never(_: bytes, __: bytes) -> bytes:
            asked.set()
            await asyncio.Event().wait()
            return b""

        other.handle("never", never)
        waiting = asyncio.ensure_future(one.request(other.node_id, "never", b"", 20))
        await asked.wait()
        await other.disconnect(one.node_id)
        await until(lambda: other.node_id not in one.peers())
        if isinstance(one, LibP2PControl):
            with pytest.raises(ControlError, match="lost"):
                await waiting
        waiting.cancel()
        await until(lambda: seen == [(other.node_id, True), (other.node_id, False)])
        await one.connect(other.node_id, other.listen_addresses(), 5)
        assert one.peers() == {other.node_id}

    play(scenario)


def test_an_outsider_with_its_own_key_is_refused(play: Play) -> None:
    async def scenario(ends: Ends) -> None:
        one, _ = await ends.pair()
        outsider = await ends.make("outsider")
        outsider.set_allowed(frozenset({one.node_id}), frozenset())
        with pytest.raises(RefusedError, match="did not let this key in"):
            await outsider.connect(one.node_id, one.listen_addresses(), 5)
        assert outsider.node_id not in one.peers()

    play(scenario)


def test_an_invite_key_may_join_and_nothing_else(play: Play) -> None:
    async def scenario(ends: Ends) -> None:
        one, _ = await ends.pair()
        joiner = await ends.make("invite")
        one.set_allowed(frozenset({key_of("other").public}), frozenset({joiner.node_id}))
        seen: list[bytes] = []
        one.on_peer(lambda peer, _: seen.append(peer))
        one.handle("echo", echo)
        one.handle(JOIN_KIND, echo)
        joiner.set_allowed(frozenset({one.node_id}), frozenset())
        await joiner.connect(one.node_id, one.listen_addresses(), 5)
        assert await joiner.request(one.node_id, JOIN_KIND, b"", 5) == joiner.node_id
        with pytest.raises(RefusedError, match="not a member"):
            await joiner.request(one.node_id, "echo", b"", 5)
        assert joiner.node_id not in one.peers()
        assert joiner.node_id not in seen

    play(scenario)


def test_who_is_no_longer_allowed_is_cut_off_at_once(play: Play) -> None:
    async def scenario(ends: Ends) -> None:
        one, other = await ends.pair()
        one.set_allowed(frozenset(), frozenset())
        assert not one.peers()
        await until(lambda: not other.peers(), within_s=2)
        with pytest.raises(RefusedError):
            await other.connect(one.node_id, one.listen_addresses(), 5)

    play(scenario)


def test_an_unreachable_peer_is_an_error_that_names_what_was_tried(play: Play) -> None:
    async def scenario(ends: Ends) -> None:
        one = await ends.make("one")
        gone = await ends.make("gone")
        addresses = gone.listen_addresses()
        await gone.stop()
        with pytest.raises(ControlError) as failure:
            await one.connect(gone.node_id, addresses, 5)
        assert not isinstance(failure.value, RefusedError)
        assert addresses[0] in str(failure.value)
        with pytest.raises(ControlError, match="no address known"):
            await one.connect(gone.node_id, [], 5)

    play(scenario)


def test_a_stopped_and_restarted_peer_can_be_connected_again_at_once(
    play: Callable[[Scenario], None],
) -> None:
    async def scenario(ends: Ends) -> None:
        one, other = await ends.pair()
        await other.stop()
        await until(lambda: not one.peers())
        with pytest.raises(ControlError):
            await one.connect(other.node_id, other.listen_addresses(), 5)
        await other.start()
        await one.connect(other.node_id, other.listen_addresses(), 5)
        other.handle("echo", echo)
        assert await one.request(other.node_id, "echo", b"", 5) == one.node_id

    play(scenario)
