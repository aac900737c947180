"""The plan as a value: which node is to hold which layer range, and its bytes on the wire.

It knows nothing of how a plan is found, nor whether its author may make one. Decoding takes hostile bytes:
limits first, then types, then the bytes must be exactly those that encoding gives.
"""

from __future__ import annotations

from dataclasses import dataclass

from pod.canonical import DecodeError, decode, encode

FORMAT_VERSION = 1
ID_BYTES = 32
MAX_PLAN_BYTES = 512 * 1024
MAX_NUM_ASSIGNMENTS = 4096
MAX_NUM_LAYERS = 4096
MAX_EPOCH = 2**53


class PlanError(ValueError):
    """These bytes are not a plan; the message says what is wrong with them."""


@dataclass(frozen=True, slots=True, order=True)
class Assignment:
    """`node` is to hold layers `[start_layer, end_layer)` of `model`."""

    model: bytes
    start_layer: int
    end_layer: int
    node: bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """All assignments, sorted. A node stands at most once per model.

    A model whose node died, and that fits nowhere else, keeps its assignments: the others then need not load
    again when that node returns. `explain` says which models are not covered.
    """

    epoch: int
    author: bytes
    assignments: tuple[Assignment, ...]

    def supersedes(self, other: Plan | None) -> bool:
        return other is None or (self.epoch, self.author) > (other.epoch, other.author)

    def of_model(self, model: bytes) -> tuple[Assignment, ...]:
        return tuple(assignment for assignment in self.assignments if assignment.model == model)

    def of_node(self, node: bytes) -> tuple[Assignment, ...]:
        return tuple(assignment for assignment in self.assignments if assignment.node == node)

    def encode(self) -> bytes:
        rows = [[a.model, a.start_layer, a.end_layer, a.node] for a in self.assignments]
        return encode([FORMAT_VERSION, self.epoch, self.author, rows])

    @classmethod
    def decode(cls, raw: bytes) -> Plan:
        """Raises PlanError for anything that `encode` does not write."""
        if len(raw) > MAX_PLAN_BYTES:
            raise PlanError(f"a plan is at most {MAX_PLAN_BYTES} bytes, this has {len(raw)}")
        plan = _plan_of(_parse(raw))
        if plan.encode() != raw:
            raise PlanError("the plan is not in canonical form")
        return plan


def _parse(raw: bytes) -> object:
    try:
        return decode(raw, MAX_PLAN_BYTES)
    except DecodeError as error:
        raise PlanError(f"the plan is not canonical CBOR: {error}") from error


def _plan_of(fields: object) -> Plan:
    match fields:
        case [int(version), int(epoch), bytes(author), list(rows)]:
            pass
        case _:
            raise PlanError("the plan does not have the fields of a plan")
    if version != FORMAT_VERSION:
        raise PlanError(f"plan format {version} is unknown here")
    if not 0 < epoch <= MAX_EPOCH or len(author) != ID_BYTES:
        raise PlanError("epoch or author of the plan is out of range")
    if len(rows) > MAX_NUM_ASSIGNMENTS:
        raise PlanError(f"a plan has at most {MAX_NUM_ASSIGNMENTS} assignments, this has {len(rows)}")
    assignments = tuple(_assignment_of(row) for row in rows)
    if list(assignments) != sorted(assignments):
        raise PlanError("the assignments of the plan are not sorted")
    if len({(a.model, a.node) for a in assignments}) != len(assignments):
        raise PlanError("the plan gives one node two ranges of one model")
    return Plan(epoch, author, assignments)


def _assignment_of(row: object) -> Assignment:
    match row:
        case [bytes(model), int(start), int(end), bytes(node)]:
            pass
        case _:
            raise PlanError("an assignment of the plan does not have the fields of one")
    if len(model) != ID_BYTES or len(node) != ID_BYTES or not 0 <= start < end <= MAX_NUM_LAYERS:
        raise PlanError("an assignment of the plan is out of range")
    return Assignment(model, start, end, node)
