"""What the books cost: checking others' entries, rebuilding, asking, settling, a new node that catches up.

The peer of the first line is the bare signature check of the same library, in turns on one core. A million
entries of the other lines carry no real signatures, because what is measured there looks at none.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import httpx
import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks import pods
from benchmarks.bench import Bench
from benchmarks.ledger_world import BenchDirectory, Key, Requests, no_signature
from benchmarks.report import Goal, Line
from ledger.entry import Entry, HoldSettled
from ledger.journal import Record
from ledger.ledger import Ledger
from ledger.receipt import is_signed_by, verify_stage
from ledger.store.sql_journal import SqlJournal
from node.books_view import account_rows
from node.home import PodHome
from node.ledger_thread import LedgerThread
from node.office import create_pod, open_membership

SECTION = "ledger"
POD = b"P" * 32
NUM_NODES = 30
CHECK_BATCH = 500
NUM_RECENT = 30
CATCH_UP_TIMEOUT_S = 300.0
LOOK_EVERY_S = 0.25


def run(bench: Bench) -> None:
    _check(bench, num_requests=500 if bench.quick else 2_000)
    _rebuild_and_ask(bench, num_entries=20_000 if bench.quick else 1_000_000)
    _settle(bench, num_requests=200 if bench.quick else 1_000)
    _catch_up(bench, num_entries=4_000 if bench.quick else 100_000)


def _keys() -> list[Key]:
    return [Key(f"node {number}") for number in range(NUM_NODES)]


def _ledger(directory: Path, name: str, key: Key, nodes: list[Key]) -> Ledger:
    url = f"sqlite:///{directory / name}.sqlite"
    known = BenchDirectory(frozenset(node.public for node in nodes))
    return Ledger.open(url, POD, known, key.public, key.sign, lambda: time.time_ns() // 1_000_000)


def _check(bench: Bench, num_requests: int) -> None:
    """Entries as they come from another node: holds with one signature, settlements with three."""
    keys = _keys()
    head, reader = keys[0], keys[1]
    requests = Requests(POD, head.public, head.sign, [head.public], [(key.public, key.sign) for key in keys])
    entries = list(requests.entries(num_requests))
    num_signatures = sum(1 + 2 * len(_receipts(entry)) for entry in entries)
    raws = [entry.raw for entry in entries]
    ours, bare = [], []
    for number in range(1 + bench.num_rounds):
        with tempfile.TemporaryDirectory() as folder:
            # What was checked in the round before would count as known.
            is_signed_by.cache_clear()
            with closing(_ledger(Path(folder), "reader", reader, keys)) as ledger:
                taken_s = _cpu_s(lambda ledger=ledger: _take_in(ledger, raws))
            bare_s = _cpu_s(lambda: _verify_bare(num_signatures))
        if number:
            ours.append(num_signatures / taken_s)
            bare.append(num_signatures / bare_s)
    bench.add(
        Line(
            SECTION,
            "signatures of others' entries checked, written to SQLite and applied, one core",
            "/s",
            tuple(ours),
            "bare Ed25519 verification",
            tuple(bare),
            Goal(0.6),
            note=f"{len(entries)} entries, {num_signatures} signatures",
        )
    )


def _receipts(entry: Entry) -> tuple[object, ...]:
    return entry.body.receipts if isinstance(entry.body, HoldSettled) else ()


def _take_in(ledger: Ledger, raws: list[bytes]) -> None:
    for start in range(0, len(raws), CHECK_BATCH):
        result = ledger.ingest(raws[start : start + CHECK_BATCH])
        assert not result.refused, result.refused[0]


def _verify_bare(num_signatures: int) -> None:
    """As many checks of messages as long as a receipt."""
    private = Ed25519PrivateKey.from_private_bytes(bytes(32))
    public, message = private.public_key(), bytes(300)
    signature = private.sign(message)
    for _ in range(num_signatures):
        public.verify(signature, message)


def _rebuild_and_ask(bench: Bench, num_entries: int) -> None:
    keys = _keys()
    members = [key.public for key in keys]
    bench.say(f"writing {num_entries} entries")
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/ledger.sqlite"
        with closing(SqlJournal(url, POD)) as journal:
            for key in keys:
                requests = Requests(
                    POD, key.public, no_signature, members, [(member, no_signature) for member in members]
                )
                journal.write(map(Record.of, requests.entries(num_entries // 2 // NUM_NODES)))
        size_mib = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20
        before = psutil.Process().memory_info().rss
        started_s, cpu_s = time.monotonic(), time.process_time()
        ledger = _ledger(Path(folder), "ledger", keys[0], keys)
        rebuilt_s, cpu_s = time.monotonic() - started_s, time.process_time() - cpu_s
        memory_mib = (psutil.Process().memory_info().rss - before) / 2**20
        with closing(ledger):
            assert ledger.num_not_applied() == 0
            num_entries = ledger.num_entries()
            bench.add(
                Line(
                    SECTION,
                    f"opening a ledger of {num_entries} entries",
                    "s",
                    (rebuilt_s,),
                    "",
                    goal=Goal(180 * num_entries / 1_000_000, at_least=False, of_ratio=False),
                    note=f"{cpu_s:.0f} s of CPU; {size_mib:.0f} MiB on disk, {memory_mib:.0f} MiB in memory",
                )
            )
            _ask(bench, ledger, keys[0].public, num_entries)
        del ledger
        gc.collect()


def _ask(bench: Bench, ledger: Ledger, account: bytes, num_entries: int) -> None:
    with tempfile.TemporaryDirectory() as home:
        create_pod(PodHome(Path(home)), "bench", "ada", "box")
        roster = open_membership(PodHome(Path(home))).roster
    queries: dict[str, Callable[[], object]] = {
        "one member's balance and what is free of holds": lambda: (
            ledger.balance(account),
            ledger.available(account),
        ),
        "the dashboard's accounts, requests and open holds": lambda: (
            account_rows(ledger, roster),
            ledger.recent_sessions(NUM_RECENT),
            ledger.open_holds(),
            ledger.num_entries(),
        ),
        "what to tell others of it: heads and digest": lambda: (ledger.heads(), ledger.digest()),
    }
    for name, query in queries.items():
        times_ms = tuple(1000 * _wall_s(query) for _ in range(20))
        goal = Goal(50, at_least=False, of_ratio=False)
        what = f"{name}, {num_entries} entries"
        bench.add(Line(SECTION, what, "ms", times_ms, "", goal=goal, note="20 times"))


def _settle(bench: Bench, num_requests: int) -> None:
    """Hold and settlement of a request with one stage, through the ledger's thread as the gateway does it."""
    keys = _keys()[:2]
    head, stage = keys
    requests = Requests(POD, head.public, head.sign, [head.public], [(stage.public, stage.sign)])
    now_ms = time.time_ns() // 1_000_000
    bodies = [requests.bodies(number, now_ms) for number in range(num_requests)]
    for _, settlement in bodies:
        # As the head does when the stage's answer comes.
        for signed in settlement.receipts:
            verify_stage(signed)

    async def measure(ledger: LedgerThread) -> tuple[list[float], list[float]]:
        held_ms, settled_ms = [], []
        for hold, settlement in bodies:
            for body, times_ms in ((hold, held_ms), (settlement, settled_ms)):
                started_s = time.perf_counter()
                await ledger.append(body)
                times_ms.append(1000 * (time.perf_counter() - started_s))
        return held_ms, settled_ms

    with tempfile.TemporaryDirectory() as folder:
        thread = LedgerThread(_ledger(Path(folder), "head", head, keys))
        with closing(thread):
            used_s = time.process_time()
            held_ms, settled_ms = asyncio.run(measure(thread))
            used_ms = 1000 * (time.process_time() - used_s) / num_requests
        flush_ms = _flush_ms(Path(folder))
    before = f"before the first token; a bare write and fsync here takes {flush_ms:.2f} ms"
    goal = Goal(1, at_least=False, of_ratio=False)
    bench.add(
        Line(SECTION, "hold of a request, median", "ms", (statistics.median(held_ms),), "", note=before)
    )
    bench.add(
        Line(
            SECTION,
            "settlement of a request with one stage, median",
            "ms",
            (statistics.median(settled_ms),),
            "",
            goal=goal,
            note=f"after the last token; {used_ms:.2f} ms of processor time with its hold",
        )
    )


def _flush_ms(folder: Path) -> float:
    """What durability costs on this disk, whoever asks for it."""
    times_ms = []
    with (folder / "flush").open("wb", buffering=0) as file:
        for _ in range(50):
            started_s = time.perf_counter()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            times_ms.append(1000 * (time.perf_counter() - started_s))
    return statistics.median(times_ms)


def _catch_up(bench: Bench, num_entries: int) -> None:
    """Two real nodes: the second joins a pod whose first has a long journal."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        first, second = (pods.Node(name, Path(folder) / name) for name in ("first", "second"))
        first.home.mkdir()
        second.home.mkdir()
        first.pod("create", "benchmark", "--member", first.member)
        bench.say(f"writing {num_entries} signed entries")
        _prolong(PodHome(first.home), num_entries)
        try:
            first.start("up", "--no-serve")
            first.wait_until_up()
            invite = first.pod("invite")["invite"]
            second.start("join", invite, "--member", second.member, "--no-serve")
            second.wait_until_up()
            started_s = time.monotonic()
            num_here = _num_entries(second)
            num_at_start = num_here
            while num_here < num_entries and time.monotonic() - started_s < CATCH_UP_TIMEOUT_S:
                time.sleep(LOOK_EVERY_S)
                num_here = _num_entries(second)
            taken_s = time.monotonic() - started_s
            cpu_s = [_used_s(node) for node in (first, second)]
        finally:
            second.stop()
            first.stop()
    if num_here < num_entries:
        bench.failed(f"catching up: {num_here} of {num_entries} entries in {taken_s:.0f} s")
        return
    bench.add(
        Line(
            SECTION,
            f"a new node catches up {num_entries} entries over loopback",
            "s",
            (taken_s,),
            "",
            goal=Goal(60 * num_entries / 100_000, at_least=False, of_ratio=False),
            note=f"two processes, libp2p; {num_at_start} were there when its API answered; "
            f"{cpu_s[0]:.0f} s of CPU there, {cpu_s[1]:.0f} s here, with their starts",
        )
    )


def _prolong(home: PodHome, num_entries: int) -> None:
    """Requests of the owner, whose own node is head and stage, after what is in its journal already."""
    membership = open_membership(home)
    node, sign, member = membership.node_id, membership.node_key.sign, membership.member_id
    with closing(SqlJournal(home.ledger_url, membership.pod)) as journal:
        last = list(journal.iterate())[-1]
        requests = Requests(membership.pod, node, sign, [member], [(node, sign)])
        entries = requests.entries(num_entries // 2, last.index + 1, last.hash)
        journal.write(map(Record.of, entries))


def _num_entries(node: pods.Node) -> int:
    note = json.loads((node.home / "running.json").read_text())
    with suppress(httpx.HTTPError), httpx.Client(trust_env=False, timeout=30) as client:
        answer = client.post(
            f"{note['api_url']}/pod/v1/ledger",
            json={},
            headers={"authorization": f"Bearer {note['local_token']}"},
        )
        for line in answer.text.splitlines():
            message = json.loads(line)
            if "result" in message:
                return int(message["result"]["num_entries"])
    return 0


def _used_s(node: pods.Node) -> float:
    assert node.process is not None
    used = psutil.Process(node.process.pid).cpu_times()
    return float(used.user + used.system)


def _cpu_s(work: Callable[[], object]) -> float:
    started_s = time.process_time()
    work()
    return time.process_time() - started_s


def _wall_s(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s
