"""Where the time of a token went, model by model, as a table. Shows what `time_view` worked out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from node.cli import show

_NUMBERS = ("compute", "queue", "hop", "sum")


def times_tables(models: Sequence[Any]) -> None:
    """Of the models that this node had requests for lately."""
    for model in models:
        if model["time_per_token"] is not None:
            show.out.print()
            _table(model["name"], model["time_per_token"])


def _table(name: str, times: Any) -> None:
    num = times["num_requests"]
    requests = "last request" if num == 1 else f"last {num} requests"
    show.out.print(f"Where a token of [bold]{name}[/] spent its time (ms; {requests} here, with prompts):")
    rows: list[Sequence[object]] = [
        (
            f"{stage['node']}[{stage['start_layer']}:{stage['end_layer']})",
            *(_ms(stage[f"{part}_us"]) for part in ("compute", "queue", "hop", "total")),
        )
        for stage in times["stages"]
    ]
    rows.append(("head and links", "", "", "", _ms(times["head_and_links_us"])))
    rows.append(("a token", "", "", "", _ms(times["total_us"])))
    show.table(("stage", *_NUMBERS), rows, right=frozenset(_NUMBERS))


def _ms(time_us: float) -> str:
    return f"{time_us / 1000:.2f}"
