"""What one hop adds: 16 KiB of hidden state from tensor to tensor, two processes (`links.py` measures)."""

from __future__ import annotations

from benchmarks import links
from benchmarks.bench import Bench
from benchmarks.report import Goal, Line

SECTION = "links"


def run(bench: Bench) -> None:
    num_round_trips, num_bulk = (300, 8) if bench.quick else (1000, 32)
    plain, ours = [], []
    for _ in range(1 if bench.quick else 3):
        plain.append(links.measure_tcp(num_round_trips, num_bulk))
        ours.append(links.measure_links(num_round_trips, num_bulk)[0])
    peer = "plain TCP, blocking, no framing"

    def add(what: str, unit: str, attribute: str, scale: float, goal: Goal | None = None) -> None:
        series = [
            tuple(getattr(result, attribute) * scale for result in results) for results in (ours, plain)
        ]
        bench.add(Line(SECTION, what, unit, series[0], peer, series[1], goal))

    limit = Goal(0.25, at_least=False, of_ratio=False)
    add("added per hop, 16 KiB, tensor to tensor, p50", "ms", "one_way_p50_us", 1e-3, limit)
    add("the same, p99", "ms", "one_way_p99_us", 1e-3)
    add("bulk one way", "MB/s", "bulk_mb_per_s", 1)
