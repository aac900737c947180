"""Choosing nodes for one model from nothing: how many stages, on which nodes, in which order.

As few stages as fit and as the wish allows; more only for a clear gain. Among nodes the ones that can take
most in the same time within their memory. The order keeps as many layers as possible where they already are.
It does not know whether moving to its choice is worth it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from node.placement.assignment import Assignment
from node.placement.cuts import (
    PRECISION,
    Load,
    Prediction,
    Seat,
    balance,
    fill,
    patience_ns,
    predict,
    readable_bytes,
)

GAIN_PERCENT = 25
"""What moving, or one more stage, must win at least."""

MAX_NUM_EXTRA_STAGES = 8
"""How many more stages than needed are tried, in case small fast nodes beat a big slow one."""

Held = Mapping[bytes, tuple[int, int]]
"""The layer range each node already holds or was told to hold."""


def is_clear_gain(new_ns: int, old_ns: int) -> bool:
    return old_ns * 100 > new_ns * (100 + GAIN_PERCENT)


def choose(load: Load, seats: Sequence[Seat], split: int, held: Held) -> tuple[Assignment, ...] | None:
    """The assignments for at least `split` stages, or as many as there is room for; None if nothing fits."""
    most = min(len(seats), load.num_layers)
    wanted = max(1, min(split, most))
    best: tuple[tuple[Assignment, ...], Prediction] | None = None
    by_node = {seat.node: seat for seat in seats}
    for num_stages in (*range(wanted, most + 1), *range(wanted - 1, 0, -1)):
        if best and not wanted <= num_stages <= len(best[0]) + MAX_NUM_EXTRA_STAGES:
            break
        found = choose_exactly(load, seats, num_stages, held)
        if found is None:
            continue
        prediction = predict(load, by_node, found)
        if best is None or is_clear_gain(prediction.token_ns, best[1].token_ns):
            best = found, prediction
    return best[0] if best else None


def choose_exactly(
    load: Load, seats: Sequence[Seat], num_stages: int, held: Held
) -> tuple[Assignment, ...] | None:
    chosen = _ablest(load, seats, num_stages, held)
    return _arrange(load, chosen, held) if chosen else None


def _ablest(load: Load, seats: Sequence[Seat], num_stages: int, held: Held) -> list[Seat] | None:
    """The seats with which the slowest stage is fastest: those that take most within a time limit."""
    low_ns, high_ns = 0, patience_ns(load, seats)
    chosen = _able_within(load, seats, num_stages, held, high_ns)
    if chosen is None:
        return None
    while high_ns - low_ns > 1 + high_ns // PRECISION:
        middle_ns = (low_ns + high_ns) // 2
        tried = _able_within(load, seats, num_stages, held, middle_ns)
        if tried is None:
            low_ns = middle_ns
        else:
            high_ns, chosen = middle_ns, tried
    return chosen


def _able_within(
    load: Load, seats: Sequence[Seat], num_stages: int, held: Held, limit_ns: int
) -> list[Seat] | None:
    def ability(numbered: tuple[int, Seat]) -> tuple[int, bool, int]:
        number, seat = numbered
        takes = min(seat.free_bytes, readable_bytes(seat, limit_ns, num_stages))
        return -takes, seat.node not in held, number

    ablest = sorted(sorted(enumerate(seats), key=ability)[:num_stages])
    chosen = [seat for _, seat in ablest]
    return chosen if fill(load, chosen, limit_ns) else None


def _arrange(load: Load, seats: list[Seat], held: Held) -> tuple[Assignment, ...] | None:
    """Cut for the order that keeps most layers where they are, unless that makes a stage clearly slower."""
    plain = balance(load, seats)
    if plain is None or not any(seat.node in held for seat in seats):
        return plain
    num_layers = {a.node: a.end_layer - a.start_layer for a in plain}
    arranged = balance(load, _order_that_keeps(seats, num_layers, held))
    if arranged is None:
        return plain
    by_node = {seat.node: seat for seat in seats}
    slowest_ns = [predict(load, by_node, cut).slowest_ns for cut in (plain, arranged)]
    return plain if is_clear_gain(*slowest_ns) else arranged


def _order_that_keeps(seats: list[Seat], num_layers: Mapping[bytes, int], held: Held) -> list[Seat]:
    """Holders in the order of what they hold, the others put one by one where they push the least away."""
    order = sorted((seat for seat in seats if seat.node in held), key=lambda seat: held[seat.node])
    others = [seat for seat in seats if seat.node not in held]
    order += others
    for seat in others:
        rest = [other for other in order if other is not seat]
        tries = [[*rest[:i], seat, *rest[i:]] for i in reversed(range(len(order)))]
        order = max(tries, key=lambda tried: _num_layers_kept(tried, num_layers, held))
    return order


def _num_layers_kept(order: list[Seat], num_layers: Mapping[bytes, int], held: Held) -> int:
    kept = start = 0
    for seat in order:
        end = start + num_layers[seat.node]
        held_start, held_end = held.get(seat.node, (0, 0))
        kept += max(0, min(end, held_end) - max(start, held_start))
        start = end
    return kept
