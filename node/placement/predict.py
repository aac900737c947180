"""How fast a route will be, from what its nodes measured: layers, head, and the way round. Pure.

It reckons one step for so many streams at once, one after another at each stage; how stages overlap when many
streams keep them all busy is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from node.links.frames import Stage
from node.placement.cuts import NS_PER_SECOND
from node.placement.view import NodeCapacity, View


def predicted_tokens_per_s(
    view: View, model: bytes, stages: Sequence[Stage], num_streams: int = 1
) -> float | None:
    """Of each of `num_streams`; None while some node of the route has not measured its layers."""
    token_ns = predicted_token_ns(view, model, stages, num_streams)
    return NS_PER_SECOND / token_ns if token_ns else None


def predicted_token_ns(view: View, model: bytes, stages: Sequence[Stage], num_streams: int = 1) -> int | None:
    by_id = {node.node: node for node in view.nodes}
    nodes = [by_id[stage.node] for stage in stages if stage.node in by_id]
    if not stages or len(nodes) < len(stages):
        return None
    token_ns = 0
    for node, stage in zip(nodes, stages, strict=True):
        speed = node.speed_of(model)
        if speed is None:
            return None
        token_ns += (stage.end_layer - stage.start_layer) * speed.layer_ns(num_streams)
    last = nodes[-1].speed_of(model)
    return token_ns + (last.head_ns(num_streams) if last else 0) + _round_ns(view, nodes)


def _round_ns(view: View, nodes: Sequence[NodeCapacity]) -> int:
    """From stage to stage, and with the token from the last to the first."""
    if len(nodes) == 1:
        return 0
    return sum(view.hop_ns(here, there) for here, there in zip(nodes, [*nodes[1:], nodes[0]], strict=True))
