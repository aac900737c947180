"""A node as somebody might change it who wants more than its share: `python -m tests.e2e.greedy_node up …`.

Its gateway keeps no line: it lets all requests ask the stages at once, without a pause, and refuses nobody
for want of credit.
"""

from __future__ import annotations

from node.cli.main import run
from node.sessions import opener, waiting_line
from node.standings import Standings


def check_nothing(_: Standings, member: bytes) -> None:
    """Whoever asks."""


waiting_line.MAX_NUM_ASKING = waiting_line.MAX_NUM_ASKING_OF_LINE = 10_000
opener.RETRY_DELAY_S = (0.001, 0.002)
Standings.check_credit = check_nothing  # type: ignore[method-assign]

if __name__ == "__main__":
    run()
