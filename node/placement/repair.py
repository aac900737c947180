"""Mending one model's assignments after nodes went away: the holes are filled, all the rest stays put.

A hole goes to one spare node, or to the neighbours on both sides of it. It knows one model and the seats that
are left; whether mending is good enough is decided by the caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from node.placement.assignment import Assignment
from node.placement.cuts import Load, Seat, predict


def mend(
    load: Load, seats: Sequence[Seat], assignments: Sequence[Assignment], split: int
) -> tuple[Assignment, ...] | None:
    """The surviving assignments with every hole filled; None if a hole can't be filled this way."""
    by_node = {seat.node: seat for seat in seats}
    mended = [a for a in assignments if a.node in by_node and _fits(load, by_node[a.node], a)]
    for start, end in list(holes(load, mended)):
        options = [*_spare_takes(load, by_node, mended, start, end)]
        shared = _neighbours_share(load, by_node, mended, start, end)
        if shared:
            options.append(shared)
        if not options:
            return None
        mended = min(
            options,
            key=lambda option: (max(0, split - len(option)), predict(load, by_node, option).token_ns),
        )
    return tuple(mended)


def holes(load: Load, assignments: Sequence[Assignment]) -> Iterator[tuple[int, int]]:
    """The layer ranges that no assignment holds."""
    start = 0
    for assignment in sorted(assignments):
        if assignment.start_layer > start:
            yield start, assignment.start_layer
        start = max(start, assignment.end_layer)
    if start < load.num_layers:
        yield start, load.num_layers


def _fits(load: Load, seat: Seat, assignment: Assignment) -> bool:
    return load.memory_bytes(assignment.start_layer, assignment.end_layer) <= seat.free_bytes


def _spare_takes(
    load: Load, seats: dict[bytes, Seat], mended: list[Assignment], start: int, end: int
) -> Iterator[list[Assignment]]:
    busy = {assignment.node for assignment in mended}
    for seat in seats.values():
        taken = Assignment(load.model, start, end, seat.node)
        if seat.node not in busy and _fits(load, seat, taken):
            yield sorted([*mended, taken])


def _neighbours_share(
    load: Load, seats: dict[bytes, Seat], mended: list[Assignment], start: int, end: int
) -> list[Assignment] | None:
    """Cut the hole between its neighbours where the slower of them is fastest."""
    left = next((a for a in mended if a.end_layer == start), None)
    right = next((a for a in mended if a.start_layer == end), None)
    others = [a for a in mended if a not in (left, right)]
    first_cut = start if right else end
    last_cut = end if left else start
    options: list[list[Assignment]] = []
    for cut in range(first_cut, last_cut + 1):
        grown = [Assignment(load.model, left.start_layer, cut, left.node)] if left else []
        grown += [Assignment(load.model, cut, right.end_layer, right.node)] if right else []
        if all(_fits(load, seats[a.node], a) for a in grown):
            options.append(sorted([*others, *grown]))
    return min(options, key=lambda option: predict(load, seats, option).slowest_ns, default=None)
