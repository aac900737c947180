"""The ground a planning step stands on: a view, and the layer ranges given out so far, model by model.

It answers who has room for a model and whether a model is covered; it decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median_low

from node.placement.assignment import Assignment, Plan
from node.placement.choice import Held
from node.placement.cuts import NS_PER_SECOND, Load, Seat
from node.placement.view import DeployedModel, NodeCapacity, View

PPM = 1_000_000
MAX_DISTURBANCE = 4
"""How many times slower, or faster than the others, a node may be measured to be for no reason that lasts."""

Layout = Mapping[bytes, tuple[Assignment, ...]]


@dataclass(frozen=True, slots=True)
class Ground:
    nodes: tuple[NodeCapacity, ...]
    models: tuple[DeployedModel, ...]
    loads: Mapping[bytes, Load]
    layout: Layout

    @classmethod
    def of(cls, view: View, plan: Plan | None) -> Ground:
        """Nodes by name and models by size, so that the order of the view has no say.

        Assignments that don't cut a deployed model into whole stages (a model removed, a plan that was never
        ours) are forgotten.
        """
        nodes = tuple(sorted(view.nodes, key=lambda node: (node.name, node.node)))
        loads = {model.model: Load(model) for model in view.models}
        models = tuple(sorted(view.models, key=lambda model: _biggest_first(loads[model.model])))
        given = {model: plan.of_model(model) for model in loads} if plan else {}
        layout = {model: row for model, row in given.items() if _is_whole(loads[model], row)}
        return cls(nodes, models, loads, layout)

    @property
    def assignments(self) -> tuple[Assignment, ...]:
        return tuple(sorted(assignment for row in self.layout.values() for assignment in row))

    def with_row(self, model: bytes, row: tuple[Assignment, ...]) -> Ground:
        return replace(self, layout={**self.layout, model: row})

    def without_row(self, model: bytes) -> Ground:
        return replace(self, layout={other: row for other, row in self.layout.items() if other != model})

    def seats(self, model: bytes) -> tuple[Seat, ...]:
        """The nodes that may hold `model` and have room for at least one of its layers."""
        load = self.loads[model]
        least_bytes = min(load.memory_bytes(i, i + 1) for i in range(load.num_layers))
        free_bytes, bytes_per_second = self.free_bytes(model), self.bytes_per_second(model)
        return tuple(
            Seat(node.node, free_bytes[node.node], bytes_per_second[node.node], node.hop_ns)
            for node in self.nodes
            if node.can_hold(model) and free_bytes[node.node] >= least_bytes
        )

    def bytes_per_second(self, model: bytes) -> dict[bytes, int]:
        """How fast each node gets through the weights of `model`.

        What memory can be read at, times the share of it that nodes with layers of the model were measured
        to reach. A node's own share counts where it is far off; else the typical one, because others that
        load at the same time disturb a measurement, and no layers should move for that.
        """
        load = self.loads[model]
        layer_bytes = (load.read_bytes(0, load.num_layers) - load.head_bytes) // load.num_layers
        shares = {
            node.node: layer_bytes * NS_PER_SECOND * PPM // (speed.layer_ns(1) * node.bytes_per_second)
            for node in self.nodes
            if (speed := node.speed_of(model))
        }
        typical = median_low(shares.values()) if shares else PPM
        own = {node: share for node, share in shares.items() if is_far_off(share, typical)}
        return {
            node.node: max(1, node.bytes_per_second * own.get(node.node, typical) // PPM)
            for node in self.nodes
        }

    def free_bytes(self, model: bytes) -> dict[bytes, int]:
        """Each node's room for `model`: what no other model was given."""
        free_bytes = {node.node: node.budget_bytes for node in self.nodes}
        for other, row in self.layout.items():
            for assignment in row if other != model else ():
                if assignment.node in free_bytes:
                    free_bytes[assignment.node] -= self._memory_bytes(assignment)
        return free_bytes

    def is_covered(self, model: bytes) -> bool:
        """All layers are given to live serving nodes that have the files and the room."""
        seats = {seat.node: seat for seat in self.seats(model)}
        return model in self.layout and all(
            a.node in seats and self._memory_bytes(a) <= seats[a.node].free_bytes for a in self.layout[model]
        )

    def is_over_full(self, model: bytes) -> bool:
        """A node would have to hold more of `model` than it has room for."""
        free_bytes = self.free_bytes(model)
        return any(
            a.node in free_bytes and self._memory_bytes(a) > free_bytes[a.node]
            for a in self.layout.get(model, ())
        )

    def held(self, model: bytes) -> Held:
        """What each node was told to hold of `model`, else the largest shard of it that it has."""
        loaded = {
            node.node: max(ranges, key=lambda held: (held[1] - held[0], -held[0]))
            for node in self.nodes
            if (ranges := [(s.start_layer, s.end_layer) for s in node.shards if s.model == model])
        }
        told = {a.node: (a.start_layer, a.end_layer) for a in self.layout.get(model, ())}
        return {**loaded, **told}

    def _memory_bytes(self, assignment: Assignment) -> int:
        return self.loads[assignment.model].memory_bytes(assignment.start_layer, assignment.end_layer)


def is_far_off(share: int, typical: int) -> bool:
    return share * MAX_DISTURBANCE < typical or share > typical * MAX_DISTURBANCE


def _biggest_first(load: Load) -> tuple[int, bytes]:
    return -load.memory_bytes(0, load.num_layers), load.model


def _is_whole(load: Load, row: tuple[Assignment, ...]) -> bool:
    starts = [assignment.start_layer for assignment in row]
    ends = [assignment.end_layer for assignment in row]
    return [0, *ends] == [*starts, load.num_layers]
