"""How results look in a terminal: tables, progress bars, credits. Knows no operation and no network."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=None if not sys.stdout.isatty() else 2, ensure_ascii=False), flush=True)


def credits_text(microcredits: object) -> str:
    """Microcredits -> credits with six digits, exact."""
    amount = int(str(microcredits))
    sign = "-" if amount < 0 else ""
    return f"{sign}{abs(amount) // 1_000_000:,}.{abs(amount) % 1_000_000:06d}"


def bytes_text(num_bytes: object) -> str:
    size = float(str(num_bytes))
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def time_text(time_ms: object) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(int(str(time_ms)) / 1000))


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: frozenset[str] = frozenset()
) -> None:
    """Print rows; columns named in `right` hold numbers. Markup in values is shown, not interpreted."""
    view = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        view.add_column(column, justify="right" if column in right else "left", overflow="fold")
    from rich.markup import escape

    for row in rows:
        view.add_row(*(escape(str(cell)) for cell in row))
    out.print(view)


class LoadBars:
    """Progress bars on stderr, one per thing that loads; lines at each quarter when it is no terminal.

    Transient bars are gone when all is over.
    """

    def __init__(self, is_transient: bool = False) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(),
            console=err,
            transient=is_transient,
            disable=not err.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, int] = {}

    def __enter__(self) -> LoadBars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        for what, quarter in self._said.items():
            if error is None and quarter < 4:
                err.print(f"{what}: loaded")

    def update(self, progress: Mapping[str, object]) -> None:
        """`progress` holds `what`, `done_bytes` and `total_bytes`."""
        what = str(progress["what"])
        done, total = int(str(progress["done_bytes"])), max(1, int(str(progress["total_bytes"])))
        if err.is_terminal:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total)
            self._bars.update(self._tasks[what], completed=done, total=total)
            return
        quarter = 4 * done // total
        if self._said.get(what, -1) < quarter:
            self._said[what] = quarter
            err.print(f"{what}: {25 * quarter}% of {bytes_text(total)}")
