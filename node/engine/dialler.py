"""Connecting the next hops of sessions, on threads of its own: the token path never waits for a handshake.

Sessions with the same next hop wait for one dial. What one head can have under way is bounded, below the
number of threads, so that routes to nowhere hold up nobody else's. Of sessions it knows their ids.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from node.links.frames import Stage
from node.links.port import LinkDown, StageLinks

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
MAX_NUM_DIALS = 64
MAX_NUM_DIALS_PER_HEAD = 8
_NUM_THREADS = 16


@dataclass(eq=False, slots=True)
class Dial:
    """`head` is whose session asked first."""

    head: bytes
    stage: Stage
    sessions: list[bytes] = field(default_factory=list)


class Dialler:
    """`request` and `finish` belong to the loop thread; `on_dialled` is called on a dialling thread."""

    def __init__(
        self,
        links: StageLinks,
        is_open: Callable[[bytes], bool],
        on_dialled: Callable[[Dial, str | None], None],
    ) -> None:
        self._links = links
        self._is_open = is_open
        self._on_dialled = on_dialled
        self._dials: dict[tuple[bytes, str], Dial] = {}
        self._threads = ThreadPoolExecutor(max_workers=_NUM_THREADS, thread_name_prefix="engine-dial")

    def request(self, head: bytes, session: bytes, stage: Stage) -> None:
        """Raises LinkDown when too many dials are under way."""
        key = (stage.node, stage.data_address)
        dial = self._dials.get(key)
        if dial is None:
            num_of_head = sum(other.head == head for other in self._dials.values())
            if num_of_head >= MAX_NUM_DIALS_PER_HEAD or len(self._dials) >= MAX_NUM_DIALS:
                raise LinkDown("too many other stages are being dialled")
            dial = self._dials[key] = Dial(head, stage)
            dial.sessions.append(session)
            self._threads.submit(self._dial, dial)
        else:
            dial.sessions.append(session)

    def finish(self, dial: Dial) -> list[bytes]:
        """The sessions that waited for it."""
        del self._dials[dial.stage.node, dial.stage.data_address]
        return dial.sessions

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _dial(self, dial: Dial) -> None:
        problem = None
        try:
            if any(self._is_open(session) for session in tuple(dial.sessions)):
                self._links.connect(dial.stage.node, dial.stage.data_address, CONNECT_TIMEOUT_S)
        except LinkDown as error:
            problem = str(error)
        except Exception as error:
            log.exception("a dial failed")
            problem = type(error).__name__
        self._on_dialled(dial, problem)
