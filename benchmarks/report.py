"""What was measured, as one Markdown table and one JSON document. Knows nothing of how it was measured.

A line compares two series of one run, taken in turns: its ratio is the median of the ratios round by round,
so that a slow minute of the machine hits both sides.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

BEGIN_MARK, END_MARK = "<!-- figures begin -->", "<!-- figures end -->"
PACKAGES = ("gpu-pod", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Goal:
    """The ratio, ours to the peer's (`of_ratio` False: our own figure), is `at_least` or at most `limit`."""

    limit: float
    at_least: bool = True
    of_ratio: bool = True

    def is_met(self, ours: Sequence[float], ratio: float | None) -> bool | None:
        figure = ratio if self.of_ratio else statistics.median(ours)
        if figure is None:
            return None
        return figure >= self.limit if self.at_least else figure <= self.limit

    def text(self, unit: str) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}" + (" x" if self.of_ratio else f" {unit}")


@dataclass(frozen=True, slots=True)
class Line:
    """`peer_values` is empty when there is no peer to compare with; then `missing` may say why.

    Both series hold one figure per round, in `unit`.
    """

    section: str
    what: str
    unit: str
    ours: tuple[float, ...]
    peer: str
    peer_values: tuple[float, ...] = ()
    goal: Goal | None = None
    missing: str = ""
    note: str = ""

    def ratios(self) -> list[float]:
        if len(self.ours) == len(self.peer_values):
            return [ours / theirs for ours, theirs in zip(self.ours, self.peer_values, strict=True)]
        if self.ours and self.peer_values:
            return [statistics.median(self.ours) / statistics.median(self.peer_values)]
        return []

    def ratio(self) -> float | None:
        ratios = self.ratios()
        return statistics.median(ratios) if ratios else None

    def is_met(self) -> bool | None:
        """None: no goal, or nothing to compare with."""
        return self.goal.is_met(self.ours, self.ratio()) if self.goal and self.ours else None


@dataclass(slots=True)
class Report:
    lines: list[Line] = field(default_factory=list)
    drivers: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def table(self) -> str:
        head = "| | ours | peer | peer's figure | ratio | goal | |\n|---|---|---|---|---|---|---|"
        return "\n".join([head, *(_row(line) for line in self.lines)])

    def markdown(self) -> str:
        parts = [machine_text(), "", self.table(), "", "How each was driven:", ""]
        parts += [f"- {name}: {how}" for name, how in self.drivers.items()]
        if self.failures:
            parts += ["", "Did not run:", "", *(f"- {failure}" for failure in self.failures)]
        return "\n".join(parts)

    def publish(self, path: Path) -> None:
        """Put the figures between the two marks in a Markdown file."""
        before, begin, rest = path.read_text().partition(BEGIN_MARK)
        _, end, after = rest.partition(END_MARK)
        if not begin or not end:
            raise ValueError(f"{path} has no lines {BEGIN_MARK} and {END_MARK}")
        path.write_text(f"{before}{begin}\n\n{self.markdown()}\n\n{end}{after}")

    def write_json(self, path: Path) -> None:
        document = {
            "machine": machine(),
            "lines": [
                asdict(line) | {"ratio": line.ratio(), "ratios": line.ratios(), "met": line.is_met()}
                for line in self.lines
            ],
            "drivers": self.drivers,
            "failures": self.failures,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")


def _row(line: Line) -> str:
    met = {True: "met", False: "**not met**", None: ""}[line.is_met()]
    peer_text = spread(line.peer_values, line.unit) if line.peer_values else line.missing
    ratios = line.ratios()
    ratio_text = spread(ratios, "", digits=2) if ratios else ""
    goal = line.goal.text(line.unit) if line.goal else ""
    what = f"{line.what} ({line.note})" if line.note else line.what
    ours = spread(line.ours, line.unit) if line.ours else "failed"
    return f"| {what} | {ours} | {line.peer} | {peer_text} | {ratio_text} | {goal} | {met} |"


def spread(values: Sequence[float], unit: str, digits: int | None = None) -> str:
    """`121 (118 to 125) tokens/s`: median, least and most."""
    middle = statistics.median(values)
    places = (0 if middle >= 100 else 1 if middle >= 10 else 2) if digits is None else digits
    text = f"{middle:.{places}f}"
    if len(values) > 1:
        text += f" ({min(values):.{places}f} to {max(values):.{places}f})"
    return f"{text} {unit}".strip()


def machine() -> dict[str, str]:
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu(),
        "features": ", ".join(cpu_features()),
        "cores": str(os.cpu_count()),
        "memory_gib": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f}",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "commit": _commit(),
        **{package: _version(package) for package in PACKAGES},
    }


def machine_text() -> str:
    facts = machine()
    versions = ", ".join(f"{package} {facts[package]}" for package in PACKAGES)
    return (
        f"{facts['date']}, commit {facts['commit']}. {facts['cpu']}, {facts['cores']} cores "
        f"({facts['features']}), {facts['memory_gib']} GiB, {facts['system']}; "
        f"Python {facts['python']}, {versions}."
    )


def _cpu() -> str:
    return _cpuinfo("model name") or platform.processor() or "unknown CPU"


def cpu_features() -> list[str]:
    """The instruction sets that decide these figures."""
    flags = set(_cpuinfo("flags").split())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16")
    return [flag for flag in wanted if flag in flags]


def _cpuinfo(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
