"""What a link says of the way to its peer, over a way that is known."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.relay import Conditions, relayed
from node.links.frames import Lane
from tests.links.ends import KEYS, TIMEOUT_S, TlsAdapter, eventually, rows_frame


@pytest.fixture
def adapter() -> Iterator[TlsAdapter]:
    made = TlsAdapter()
    yield made
    made.close()


def test_a_link_knows_how_long_its_way_is(adapter: TlsAdapter) -> None:
    one, other = adapter.stage(KEYS[0]), adapter.stage(KEYS[1])
    assert one.links.link_us(other.node) == 0
    with relayed(other.links.data_address, Conditions(delay_s=0.02)) as address:
        one.links.connect(other.node, address, TIMEOUT_S)
        eventually(lambda: one.links.link_us(other.node) > 0)
        assert 20_000 <= one.links.link_us(other.node) < 40_000
        one.links.send(other.node, rows_frame(3, 40_000), Lane.DECODE)
        eventually(lambda: other.positions == [3])
    eventually(lambda: one.downs)
    assert one.links.link_us(other.node) == 0
