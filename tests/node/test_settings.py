"""What the address options take and refuse."""

from __future__ import annotations

import pytest

from node.cli.options import node_settings
from node.errors import UserError
from node.settings import NodeSettings, check_dialable


def settings(listen: str | None, data: str | None) -> NodeSettings:
    return node_settings(
        "127.0.0.1:1", "0.0.0.0:2", "0.0.0.0:3", None, "cpu", None, False, True, listen, data
    )


def with_bits(text: str) -> NodeSettings:
    return node_settings("a:1", "b:2", "c:3", None, "cpu", None, False, hidden_bits=text)


def test_a_forwarded_port_stands_in_for_each_plane() -> None:
    chosen = settings("relay.example:9001", "[fd00::1]:9002")
    assert chosen.advertise_listen == "relay.example:9001"
    assert chosen.advertise_data == "[fd00::1]:9002"
    assert settings(None, None).advertise_data is None


def test_hidden_bits_are_16_unless_asked_for() -> None:
    assert [with_bits(text).hidden_bits for text in ("16", "8", "auto")] == [16, 8, 0]
    assert settings(None, None).hidden_bits == 16
    with pytest.raises(UserError, match="--hidden-bits"):
        with_bits("4")


@pytest.mark.parametrize("text", ["9001", "host", "host:0", "host:70000", "a b:1", ":1", "-x:1"])
def test_what_nobody_can_dial_is_refused_by_the_options_name(text: str) -> None:
    with pytest.raises(UserError, match="--advertise-listen"):
        settings(text, None)
    with pytest.raises(UserError, match="--advertise-data"):
        check_dialable(text, "--advertise-data")
