"""`make bench`, or `python -m benchmarks [SECTION ...] [--quick] [--json PATH]`: figures beside peers.

Progress goes to standard error, the Markdown table to standard output, everything to the JSON file. A section
that fails is named below the table and the others still run.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import signal
import sys
import time
from pathlib import Path

from benchmarks.bench import DRIVERS, Bench, one_line

SECTIONS = {
    "decode": "benchmarks.decode",
    "prefill": "benchmarks.prefill",
    "latency": "benchmarks.latency",
    "split": "benchmarks.split",
    "links": "benchmarks.hops",
    "emulated": "benchmarks.emulated",
    "memory": "benchmarks.memory",
    "start": "benchmarks.startup",
    "ledger": "benchmarks.ledger",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, few tokens: is everything in order?"
    )
    parser.add_argument("--json", type=Path, default=Path("artefacts/bench.json"), metavar="PATH")
    parser.add_argument(
        "--publish", type=Path, metavar="FILE", help="put the figures into this document as well"
    )
    parser.add_argument(
        "--peers",
        default=",".join(name for name in DRIVERS if name != "ours"),
        metavar="NAMES",
        help="which to compare with: %(default)s; or none",
    )
    chosen = parser.parse_args()
    if unknown := set(chosen.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    # Ended from outside, the nodes and peers end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    bench = Bench(chosen.quick, chosen.peers.split(","))
    start_s = time.monotonic()
    try:
        for name in chosen.sections or SECTIONS:
            run_section(bench, name)
            bench.report.write_json(chosen.json)
    finally:
        bench.close()
    print(bench.report.markdown())
    if chosen.publish:
        bench.report.publish(chosen.publish)
    bench.say(f"{time.monotonic() - start_s:.0f} s; JSON in {chosen.json}")


def run_section(bench: Bench, name: str) -> None:
    bench.say(f"== {name}")
    try:
        importlib.import_module(SECTIONS[name]).run(bench)
    except Exception as error:
        bench.failed(f"{name}: {type(error).__name__}: {one_line(error)}")


if __name__ == "__main__":
    main()
