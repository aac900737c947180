"""The pages as text: templates, escaping, and the few derived values that a template should not compute."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from node.amounts import period_text, share_text
from node.dashboard import present
from node.gateway.backend import DashboardView, ModelRow, NodeRow, ShardRow

FOLDER = Path(__file__).parent
NUM_COLORS = 8


@dataclass(frozen=True, slots=True)
class Strip:
    """One node's layers of one model, drawn as bars on a line of `num_layers`."""

    node: NodeRow
    color: int
    shards: tuple[ShardRow, ...]


def strips(model: ModelRow, nodes: Sequence[NodeRow]) -> list[Strip]:
    """Nodes that hold layers of `model`, in the order of their layers; a node has one color everywhere."""
    colored = sorted(nodes, key=lambda node: node.node)
    color_of = {node.node: index % NUM_COLORS for index, node in enumerate(colored)}
    found = [
        Strip(node, color_of[node.node], shards)
        for node in nodes
        if (shards := tuple(shard for shard in node.shards if shard.model_name == model.name))
    ]
    return sorted(found, key=lambda strip: (strip.shards[0].start_layer, strip.node.name))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("node.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = (
        "credits",
        "count",
        "rate",
        "milliseconds",
        "gibibytes",
        "parameters",
        "iso_time",
        "clock_time",
    )
    environment.filters.update({name: getattr(present, name) for name in names})
    environment.filters |= {"share": share_text, "period": period_text}
    environment.globals["strips"] = strips
    environment.globals["style_version"] = _version("dashboard.css")
    environment.globals["script_version"] = _version("dashboard.js")
    return environment


def static_file(name: str) -> bytes:
    return (FOLDER / "static" / name).read_bytes()


def _version(name: str) -> str:
    """In the URL, so that a browser may keep the file for as long as it stays the same."""
    return hashlib.sha256(static_file(name)).hexdigest()[:12]


_TEMPLATES = _environment()


def dashboard_page(view: DashboardView, logged_in: bool) -> str:
    return _TEMPLATES.get_template("dashboard.html").render(view=view, logged_in=logged_in)


def live_fragment(view: DashboardView) -> str:
    return _TEMPLATES.get_template("live.html").render(view=view)


def login_page(problem: str = "") -> str:
    return _TEMPLATES.get_template("login.html").render(problem=problem)
