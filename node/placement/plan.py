"""Placement: which node is to hold which layer range of which model, with hysteresis.

`plan` is a priority list of changes, each a pure function from the ground to a better ground or None; it is
applied until none is left, so planning again from its own result changes nothing. It knows no clock: a node
that went away counts as gone when the view says so.
"""

from __future__ import annotations

from dataclasses import replace

from node.placement.assignment import Assignment, Plan, PlanError
from node.placement.choice import choose, choose_exactly, is_clear_gain
from node.placement.cuts import predict
from node.placement.ground import Ground
from node.placement.repair import mend
from node.placement.view import DeployedModel, View

__all__ = ["Assignment", "Plan", "PlanError", "plan"]

MAX_NUM_CHANGES_PER_MODEL = 16


def plan(view: View, previous: Plan | None, author: bytes) -> Plan | None:
    """The next plan, or None to keep the previous one. The same view gives the same ranges on every node."""
    ground = Ground.of(view, previous)
    for _ in range(MAX_NUM_CHANGES_PER_MODEL * len(view.models)):
        change = (
            _mend_broken(ground)
            or _place_missing(ground)
            or _split_as_wished(ground)
            or _move_for_gain(ground)
            or _pack_anew(ground)
            or _give_up_over_full(ground)
        )
        if change is None:
            break
        ground = change
    if ground.assignments == (previous.assignments if previous else ()):
        return None
    return Plan(previous.epoch + 1 if previous else 1, author, ground.assignments)


def _mend_broken(ground: Ground) -> Ground | None:
    """Smallest model first: where a node has become too full, that moves the least."""
    for model in reversed(ground.models):
        if model.model in ground.layout and not ground.is_covered(model.model):
            row = _mended_row(ground, model)
            if row:
                return ground.with_row(model.model, row)
    return None


def _mended_row(ground: Ground, model: DeployedModel) -> tuple[Assignment, ...] | None:
    load, seats = ground.loads[model.model], ground.seats(model.model)
    mended = mend(load, seats, ground.layout[model.model], model.split)
    anew = choose(load, seats, model.split, ground.held(model.model)) if seats else None
    if mended is None or anew is None:
        return mended or anew
    by_node = {seat.node: seat for seat in seats}
    now, then = predict(load, by_node, mended), predict(load, by_node, anew)
    if is_clear_gain(then.token_ns, now.token_ns):
        return anew
    return anew if len(anew) == len(mended) and is_clear_gain(then.slowest_ns, now.slowest_ns) else mended


def _place_missing(ground: Ground) -> Ground | None:
    for model in ground.models:
        seats = ground.seats(model.model)
        if model.model not in ground.layout and seats:
            row = choose(ground.loads[model.model], seats, model.split, ground.held(model.model))
            if row:
                return ground.with_row(model.model, row)
    return None


def _split_as_wished(ground: Ground) -> Ground | None:
    for model in ground.models:
        if not ground.is_covered(model.model):
            continue
        load, seats = ground.loads[model.model], ground.seats(model.model)
        num_stages = len(ground.layout[model.model])
        for wanted in range(min(model.split, len(seats), load.num_layers), num_stages, -1):
            row = choose_exactly(load, seats, wanted, ground.held(model.model))
            if row:
                return ground.with_row(model.model, row)
    return None


def _move_for_gain(ground: Ground) -> Ground | None:
    """Never fewer stages than wished, never a slower token: each move is a gain, so moving ends."""
    for model in ground.models:
        if not ground.is_covered(model.model):
            continue
        load, seats, row = ground.loads[model.model], ground.seats(model.model), ground.layout[model.model]
        anew = choose(load, seats, min(model.split, len(row)), ground.held(model.model))
        if anew is None or len(anew) < min(model.split, len(row)):
            continue
        by_node = {seat.node: seat for seat in seats}
        now, then = predict(load, by_node, row), predict(load, by_node, anew)
        is_faster = is_clear_gain(then.token_ns, now.token_ns)
        is_evener = len(anew) == len(row) and is_clear_gain(then.slowest_ns, now.slowest_ns)
        if is_faster or (is_evener and then.token_ns <= now.token_ns):
            return ground.with_row(model.model, anew)
    return None


def _pack_anew(ground: Ground) -> Ground | None:
    """Everything from nothing, biggest model first, if that serves more models than now."""
    num_covered = sum(ground.is_covered(model.model) for model in ground.models)
    if num_covered == len(ground.models):
        return None
    packed = replace(ground, layout={})
    for model in ground.models:
        seats = packed.seats(model.model)
        row = (
            choose(ground.loads[model.model], seats, model.split, ground.held(model.model)) if seats else None
        )
        packed = packed.with_row(model.model, row) if row else packed
    return packed if len(packed.layout) > num_covered else None


def _give_up_over_full(ground: Ground) -> Ground | None:
    for model in ground.models:
        if ground.is_over_full(model.model):
            return ground.without_row(model.model)
    return None
