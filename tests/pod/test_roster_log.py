"""The log on disk: what was added is there after any crash, a torn end is cut off, damage is reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from pod.roster.apply import RosterError
from pod.roster.events import EventError, PolicySet
from pod.roster.log import MAX_LAMPORT_JUMP, RosterLog
from tests.pod.people import Story


def written(path: Path) -> Story:
    story = Story()
    story.member("mark")
    log = RosterLog(path)
    assert [log.add(event) for event in story.said] == [True] * len(story.said)
    assert not log.add(story.created)
    return story


def test_events_are_read_back_with_the_same_roster_and_digest(tmp_path: Path) -> None:
    story = written(tmp_path / "roster.log")
    log, memory = RosterLog(tmp_path / "roster.log"), RosterLog(None)
    memory.add_all(story.said)
    assert log.events() == tuple(story.said)
    assert (log.pod, log.roster, log.digest()) == (story.pod, memory.roster, memory.digest())
    assert log.next_lamport == len(story.said)


@pytest.mark.parametrize("num_bytes_left_of_last", [1, 5, 8, 50])
def test_a_torn_tail_is_cut_off_and_the_rest_stays(tmp_path: Path, num_bytes_left_of_last: int) -> None:
    path = tmp_path / "roster.log"
    story = written(path)
    whole = path.stat().st_size
    extra = story.say("olga", PolicySet(b"rules"))
    RosterLog(path).add(extra)
    path.write_bytes(path.read_bytes()[: whole + num_bytes_left_of_last])
    assert len(RosterLog(path)) == len(story.said) - 1
    assert path.stat().st_size == whole
    log = RosterLog(path)
    log.add(extra)
    assert RosterLog(path).roster.policy == b"rules"


def test_zeros_left_by_a_power_cut_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "roster.log"
    story = written(path)
    with open(path, "ab") as file:
        file.write(bytes(4096))
    assert len(RosterLog(path)) == len(story.said)


def test_a_flipped_byte_in_the_middle_is_reported_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "roster.log"
    written(path)
    stored = bytearray(path.read_bytes())
    stored[30] ^= 1
    path.write_bytes(stored)
    with pytest.raises(RosterError, match="damaged at byte 0"):
        RosterLog(path)


def test_events_of_another_pod_or_far_ahead_are_refused() -> None:
    story, log = Story(), RosterLog(None)
    log.add(story.created)
    with pytest.raises(EventError, match="too far ahead"):
        log.add(story.say("olga", PolicySet(b""), lamport=MAX_LAMPORT_JUMP + 1))
    other = RosterLog(None, pod=bytes(32))
    with pytest.raises(EventError, match="another pod"):
        other.add(story.created)
    with pytest.raises(RosterError, match="no pod yet"):
        _ = RosterLog(None).roster
