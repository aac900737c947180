"""The log on disk: what was added is there after any crash, a torn end is cut off, damage is reported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pod.roster.apply import RosterError
from pod.roster.cuts import kept_of_member
from pod.roster.events import (
    EventError,
    KeyIssued,
    KeyRevoked,
    LimitedKeyIssued,
    MemberRemoved,
    PolicySet,
    Role,
)
from pod.roster.log import MAX_LAMPORT_JUMP, MAX_NUM_WAITING, MAX_WAITING_BYTES, QUOTA, RosterLog
from tests.pod.people import Story, key_of


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


def test_what_outsiders_say_is_neither_stored_nor_served_and_waits_within_limits(tmp_path: Path) -> None:
    path = tmp_path / "roster.log"
    story = written(path)
    log, size = RosterLog(path), path.stat().st_size
    flood = [story.say("outsider", PolicySet(bytes(60_000)), lamport=index) for index in range(30)]
    assert log.add_all(flood) == []
    assert len(log._waiting) == MAX_WAITING_BYTES // 60_000
    assert log.add_all([story.say("outsider", PolicySet(b""), lamport=n) for n in range(300)]) == []
    assert len(log._waiting) == MAX_NUM_WAITING
    assert path.stat().st_size == size
    assert not {event.author for event in log.events()} & {flood[0].author}


def test_what_arrives_before_its_author_joins_counts_afterwards() -> None:
    story, log = Story(), RosterLog(None)
    log.add(story.created)
    story.member("adam", Role.ADMIN)
    story.invite("adam", "by adam")
    story.join("adam", "mark", "by adam")
    early = story.say("mark", KeyIssued(bytes(16), "laptop", 0))
    assert not log.add(early)
    for event in story.said[:0:-1]:
        log.add(event)
    assert set(log.events()) == set(story.said)
    assert (key_of("mark").public, bytes(16)) in log.roster.keys


def test_a_member_that_says_too_much_is_refused_and_can_still_be_removed() -> None:
    story, log = Story(), RosterLog(None)
    story.member("mark", Role.GUEST)
    log.add_all(story.said)
    events = [story.say("mark", KeyRevoked(key_of("mark").public, n.to_bytes(16, "big"))) for n in range(300)]
    new, refused = log.add_possible(events)
    assert len(new) == QUOTA.max_num_events
    assert len(refused) == 300 - len(new)
    big = [story.say("olga", PolicySet(bytes(60_000)), lamport=n) for n in range(20)]
    assert log.add_all(big) == big
    kept = kept_of_member(key_of("mark").public, log.events())
    log.add(story.say("olga", MemberRemoved(key_of("mark").public, kept)))
    assert len(log.roster.members) == 1
    assert log.add_possible([events[-1]])[0] == []


@pytest.mark.parametrize("models", [(), tuple(str(n) + 255 * "\N{GRINNING FACE}" for n in range(8))])
def test_whatever_keys_a_member_may_make_it_can_revoke_them_all(models: tuple[str, ...]) -> None:
    story, log = Story(), RosterLog(None)
    story.member("mark")
    log.add_all(story.said)

    def make_keys() -> None:
        for n in range(QUOTA.max_num_events):
            log.add(story.say("mark", LimitedKeyIssued(n.to_bytes(16, "big"), "laptop", 0, 1, models, 0, 0)))

    with pytest.raises(EventError, match="no room for another key"):
        make_keys()
    keys = log.roster.keys.values()
    assert len(keys) > QUOTA.max_num_events // 4
    for key in keys:
        assert log.add(story.say("mark", KeyRevoked(key.member, key.id)))
    assert all(key.revoked for key in log.roster.keys.values())


def test_a_members_quota_counts_bytes_too() -> None:
    story, log = Story(), RosterLog(None)
    story.member("mark")
    log.add_all(story.said)
    new, refused = log.add_possible(
        [story.say("mark", PolicySet(bytes(60_000)), lamport=n) for n in range(30)]
    )
    assert len(new) == QUOTA.max_num_bytes // 60_200
    assert len(new) + len(refused) == 30


def test_a_full_roster_still_takes_what_the_owner_says(monkeypatch: pytest.MonkeyPatch) -> None:
    story, log = Story(), RosterLog(None)
    story.member("mark")
    log.add_all(story.said)
    monkeypatch.setattr("pod.roster.log.MAX_NUM_EVENTS", len(log))
    with pytest.raises(EventError, match="full"):
        log.add(story.say("mark", PolicySet(b"")))
    log.add(story.say("olga", MemberRemoved(key_of("mark").public, ())))
    assert len(log.roster.members) == 1


FULL_DISK = """
import resource, sys
from pathlib import Path
from pod.roster.events import PolicySet
from pod.roster.log import RosterLog
from tests.pod.people import Story

path = Path(sys.argv[1])
story = Story()
log = RosterLog(path)
log.add(story.created)
before = (log.digest(), log.next_lamport, path.stat().st_size)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (before[2] + 100, hard))
try:
    log.add(story.say("olga", PolicySet(bytes(5000))))
except OSError:
    pass
else:
    raise SystemExit("it was written")
assert before == (log.digest(), log.next_lamport, path.stat().st_size)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
log.add(story.say("olga", PolicySet(b"good")))
assert RosterLog(path).digest() == log.digest()
assert RosterLog(path).roster.policy == b"good"
"""


def test_a_full_disk_leaves_memory_and_file_as_they_were(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "roster.log")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
