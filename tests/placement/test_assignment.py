"""Plans on the wire: what is written is read back, and nothing else is."""

from __future__ import annotations

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.placement.assignment import MAX_PLAN_BYTES, Assignment, Plan, PlanError
from tests.placement.pods import first_plan, id_of, make_model, make_node, make_view

A, B, MODEL = id_of("a"), id_of("b"), id_of("m")
PLAN = Plan(7, A, tuple(sorted([Assignment(MODEL, 0, 10, A), Assignment(MODEL, 10, 20, B)])))


def test_round_trip() -> None:
    view = make_view([make_node(name) for name in "abc"], make_model("x", split=3), make_model("y", split=2))
    made = first_plan(view)
    assert Plan.decode(made.encode()) == made
    assert Plan.decode(PLAN.encode()) == PLAN


def test_the_higher_epoch_wins_then_the_author() -> None:
    later, other = Plan(8, A, ()), Plan(7, max(A, B), ())
    assert PLAN.supersedes(None)
    assert later.supersedes(other)
    assert not other.supersedes(later)
    assert not PLAN.supersedes(PLAN)
    low, high = Plan(7, min(A, B), ()), Plan(7, max(A, B), ())
    assert high.supersedes(low)
    assert not low.supersedes(high)


def encode(*fields: object) -> bytes:
    return cbor2.dumps(list(fields), canonical=True)


ROWS = [[a.model, a.start_layer, a.end_layer, a.node] for a in PLAN.assignments]
BAD = {
    "nothing": (b"", "not CBOR"),
    "no CBOR": (b"\xff\xff", "not CBOR"),
    "cut off": (PLAN.encode()[:-1], "not CBOR"),
    "more behind": (PLAN.encode() + b"\x00", "canonical"),
    "not a list": (cbor2.dumps(1), "fields of a plan"),
    "a field more": (encode(1, 7, A, ROWS, 0), "fields of a plan"),
    "other version": (encode(2, 7, A, ROWS), "format 2 is unknown"),
    "epoch as text": (encode(1, "7", A, ROWS), "fields of a plan"),
    "epoch 0": (encode(1, 0, A, ROWS), "out of range"),
    "epoch that ends all epochs": (encode(1, 2**63, A, ROWS), "out of range"),
    "short author": (encode(1, 7, A[:31], ROWS), "out of range"),
    "backward range": (encode(1, 7, A, [[MODEL, 5, 5, A]]), "assignment of the plan is out of range"),
    "negative layer": (encode(1, 7, A, [[MODEL, -1, 5, A]]), "assignment of the plan is out of range"),
    "endless layers": (encode(1, 7, A, [[MODEL, 0, 5000, A]]), "assignment of the plan is out of range"),
    "short node": (encode(1, 7, A, [[MODEL, 0, 5, A[:5]]]), "assignment of the plan is out of range"),
    "row of three": (encode(1, 7, A, [[MODEL, 0, 5]]), "assignment of the plan does not have"),
    "unsorted": (encode(1, 7, A, ROWS[::-1]), "not sorted"),
    "one node twice": (encode(1, 7, A, [[MODEL, 0, 5, A], [MODEL, 5, 9, A]]), "two ranges"),
    "too many rows": (encode(1, 7, A, [[MODEL, 0, 5, A]] * 4097), "at most 4096"),
    "too long": (bytes(MAX_PLAN_BYTES + 1), "at most"),
    "long integer": (PLAN.encode().replace(b"\x84\x01\x07", b"\x84\x01\x18\x07", 1), "canonical"),
    "true as version": (encode(True, 7, A, ROWS), "canonical"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_bytes_are_refused(case: str) -> None:
    raw, message = BAD[case]
    with pytest.raises(PlanError, match=message):
        Plan.decode(raw)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, len(PLAN.encode()) - 1), st.integers(0, 255))
def test_any_byte_changed_is_refused_or_another_plan(place: int, value: int) -> None:
    raw = bytearray(PLAN.encode())
    raw[place] = value
    try:
        decoded = Plan.decode(bytes(raw))
    except PlanError:
        return
    assert decoded.encode() == raw


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_noise_is_refused_in_one_way(raw: bytes) -> None:
    with pytest.raises(PlanError):
        Plan.decode(raw)
