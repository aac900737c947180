"""Run by the kill test: appends holds and settlements until it is killed, and says what is durable."""

from __future__ import annotations

import sys
from itertools import count

from tests.ledger.world import World, session_id


def main(url: str, first: int) -> None:
    world = World()
    ledger = world.ledger(0, url)
    for number in count(first):
        session = session_id(number)
        ledger.append(world.hold(session))
        entry = ledger.append(world.settlement(session, world.receipt(session)))
        sys.stdout.write(f"{entry.index} {entry.hash.hex()}\n")
        sys.stdout.flush()


main(sys.argv[1], int(sys.argv[2]))
