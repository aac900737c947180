"""A node alone in a process: opens the home given, says its address, stays until its input ends."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvloop

from pod.membership import Membership


async def main(home: str) -> None:
    node = Membership.open(Path(home))
    await node.start()
    print(node.addresses()[0], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await node.stop()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
