"""Several nodes' Memberships in one process, in memory or over real libp2p on loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from pod.control import ControlTransport
from pod.identity import KeyPair
from pod.membership import Membership, libp2p_transport
from pod.memory_control import MemoryControl, MemoryNetwork
from pod.roster.events import Role


class Machines:
    """Directories by name below one; everything started is stopped at the end."""

    def __init__(self, directory: Path, network: MemoryNetwork | None = None) -> None:
        self._directory = directory
        self._network = network
        self.running: dict[str, Membership] = {}
        self.skew_ms: dict[str, int] = {}

    def home(self, name: str) -> Path:
        return self._directory / name

    def clock(self, name: str) -> Callable[[], int]:
        return lambda: time.time_ns() // 1_000_000 + self.skew_ms.get(name, 0)

    def make_transport(self, key: KeyPair, listen: Sequence[str]) -> ControlTransport:
        if self._network is not None:
            return MemoryControl(self._network, key.public)
        return libp2p_transport(key, listen)

    async def create(self, name: str) -> Membership:
        return await self.up(
            Membership.create_pod(self.home(name), "alpha", name, f"{name}-pc", self.clock(name))
        )

    async def join(self, name: str, text: str) -> Membership:
        """Joins and starts."""
        return await self.up(
            await Membership.join(
                self.home(name), text, name, f"{name}-pc", self.clock(name), self.make_transport
            )
        )

    async def up(self, membership: Membership, listen: str = "127.0.0.1:0") -> Membership:
        await membership.start([listen], make_transport=self.make_transport)
        self.running[membership.directory.name] = membership
        return membership

    async def down(self, name: str) -> None:
        await self.running.pop(name).stop()

    async def pod_of(self, *names: str, role: Role = Role.MEMBER) -> list[Membership]:
        """The first creates the pod and invites the others."""
        first = await self.create(names[0])
        return [first] + [await self.join(name, first.invite(role).text()) for name in names[1:]]

    async def stop(self) -> None:
        for membership in self.running.values():
            await membership.stop()


def play(
    directory: Path,
    scenario: Callable[[Machines], Awaitable[None]],
    network: MemoryNetwork | None = None,
    within_s: float = 45,
) -> None:
    async def whole() -> None:
        machines = Machines(directory, network)
        try:
            await asyncio.wait_for(scenario(machines), within_s)
        finally:
            await machines.stop()

    asyncio.run(whole())
