"""The ledger as CSV, JSON lines and beancount: what other programs read adds up to what the node shows."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from beancount import loader
from beancount.core.data import Transaction as BeancountTransaction

from ledger.entry import HoldOpened, HoldSettled, HoldVoided, VoidReason
from ledger.ledger import Ledger
from ledger.rate_card import DEFAULT_RATE_CARD
from ledger.receipt import Receipt, co_sign, expected_amount, sign_as_head
from ledger.transactions import Transactions
from node.cli.export import parse_since
from node.errors import UserError
from node.home import PodHome
from node.ledger_export import FORMATS, Filters, exact_credits
from node.office import create_pod, open_ledger, open_membership
from node.roster_directory import RosterDirectory
from pod.membership import Membership
from tests.ledger.world import session_id

MODEL, OTHER_MODEL, KEY = b"M" * 32, b"N" * 32, b"K" * 16


class Books:
    """A pod of one on disk, with requests to two models; its member is called as a formula would be."""

    def __init__(self, home: PodHome) -> None:
        create_pod(home, 'alpha "the first"', "=SUM(A1)", "desk")
        self.home = home
        self.membership: Membership = open_membership(home)
        self._thread = open_ledger(home, self.membership)
        self.ledger: Ledger = self._thread.ledger
        for number in range(6):
            self.request(number, MODEL if number % 2 else OTHER_MODEL)

    def close(self) -> None:
        self._thread.close()

    def request(self, number: int, model: bytes) -> None:
        member, node = self.membership.member_id, self.membership.node_key
        receipt = Receipt(
            pod=self.membership.pod,
            session=session_id(number),
            stage_index=0,
            head=node.public,
            payer=member,
            key_id=KEY,
            stage=node.public,
            model=model,
            start_layer=0,
            end_layer=30,
            num_parameters=134_515_008,
            rate_card_version=1,
            sequence=1,
            num_prompt_tokens=17 + number,
            num_cached_tokens=0,
            num_output_tokens=23,
            amount_microcredits=0,
        )
        receipt = replace(receipt, amount_microcredits=expected_amount(receipt, DEFAULT_RATE_CARD))
        signed = co_sign(sign_as_head(receipt, node.sign), node.sign)
        now_ms = 10**14
        hold = HoldOpened(session_id(number), member, KEY, model, 10**9, now_ms, 1)
        self.ledger.append(hold)
        self.ledger.append(HoldSettled(session_id(number), 17 + number, 0, 23, (signed,)))

    def text(self, format_name: str, filters: Filters | None = None) -> str:
        roster = self.membership.roster
        transactions = Transactions(self.ledger._journal, RosterDirectory(lambda: roster))
        return "".join(FORMATS[format_name](transactions, roster, filters or Filters()))


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    made = Books(PodHome(tmp_path / "home"))
    yield made
    made.close()


def beancount_balances(text: str) -> dict[str, Decimal]:
    """By account, as beancount itself adds them up. Its own checks must find nothing."""
    entries, errors, _ = loader.load_string(text)
    assert [error.message for error in errors] == []
    balances: defaultdict[str, Decimal] = defaultdict(Decimal)
    for entry in entries:
        if isinstance(entry, BeancountTransaction):
            for posting in entry.postings:
                assert posting.units is not None
                balances[posting.account] += posting.units.number
    return dict(balances)


def credits(microcredits: int) -> Decimal:
    return Decimal(microcredits) / 1_000_000


def test_beancount_adds_up_to_the_same_balances_and_finds_no_error(books: Books) -> None:
    found = beancount_balances(books.text("beancount"))
    assert sorted(found.values()) == sorted(credits(amount) for amount in books.ledger.balances().values())
    assert sum(found.values()) == 0


def test_beancounts_own_program_passes(books: Books, tmp_path: Path) -> None:
    path = tmp_path / "pod.beancount"
    path.write_text(books.text("beancount"))
    command = [sys.executable, "-m", "beancount.scripts.check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_single_microcredit_more_is_found(books: Books) -> None:
    """The balances at the end are a check that can fail."""
    text = books.text("beancount")
    line = next(line for line in text.splitlines() if " balance Assets:Treasury " in line)
    amount = line.split()[3]
    wrong = text.replace(line, line.replace(amount, str(Decimal(amount) + Decimal("0.000001"))))
    _, errors, _ = loader.load_string(wrong)
    assert len(errors) == 1


def test_csv_and_json_lines_add_up_too(books: Books) -> None:
    expected = {key.hex(): amount for key, amount in books.ledger.balances().items() if amount}
    rows = list(csv.DictReader(io.StringIO(books.text("csv"))))
    sums: defaultdict[str, int] = defaultdict(int)
    for row in rows:
        sums[row["account_id"]] += int(row["amount_microcredits"])
        assert credits(int(row["amount_microcredits"])) == Decimal(row["amount_credits"])
    assert dict(sums) == expected
    assert {row["account"] for row in rows} == {"'=SUM(A1)", "treasury", "issuance"}
    objects = [json.loads(line) for line in books.text("jsonl").splitlines()]
    assert len(objects) == books.ledger.num_entries()
    sums.clear()
    for entry in objects:
        assert sum(posting["amount_microcredits"] for posting in entry["postings"]) == 0
        for posting in entry["postings"]:
            sums[posting["account_id"]] += posting["amount_microcredits"]
    assert dict(sums) == expected


def test_filters_leave_out_the_rest(books: Books) -> None:
    def entries(filters: Filters) -> list[dict[str, object]]:
        return [json.loads(line) for line in books.text("jsonl", filters).splitlines()]

    of_model = entries(Filters(model=MODEL))
    assert {entry["model"] for entry in of_model} == {MODEL.hex()[:12]}
    assert len(of_model) == 6
    assert entries(Filters(since_ms=10**14)) == []
    assert entries(Filters(since_ms=0)) == entries(Filters())
    assert entries(Filters(member=b"?" * 32)) == []
    own = entries(Filters(member=books.membership.member_id))
    assert {entry["type"] for entry in own} == {"AccountOpened", "HoldOpened", "HoldSettled"}


@pytest.mark.parametrize("filters", [Filters(model=MODEL), Filters(since_ms=2 * 10**12)])
def test_filtered_beancount_is_sound_as_well(books: Books, filters: Filters) -> None:
    """What is left out is summed up before, or there are no balances to check."""
    found = beancount_balances(books.text("beancount", filters))
    assert sum(found.values()) == 0
    if filters.model is None:
        assert sorted(found.values()) == sorted(credits(n) for n in books.ledger.balances().values())


def test_the_command_beside_a_running_writer(books: Books, tmp_path: Path) -> None:
    """The fixture has the ledger open, as a running node would."""
    environment = os.environ | {"POD_HOME": str(books.home.path)}

    def export(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "node", "ledger", "export", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=60, check=False
        )

    assert export("--format", "beancount").stdout == books.text("beancount")
    said = json.loads(export("--format", "csv", "-o", str(tmp_path / "out.csv"), "--json").stdout)
    assert said["num_lines"] == len((tmp_path / "out.csv").read_text().splitlines())
    for arguments, reason in (
        (("--format", "xml"), "--format must be one of csv, jsonl, beancount"),
        (("--member", "nobody"), "no member is called 'nobody'"),
        (("--model", "none"), "the pod has no model 'none'"),
        (("--since", "yesterday"), "--since must be a day"),
        (("-o", str(tmp_path / "nowhere" / "out")), "cannot write"),
    ):
        done = export(*arguments)
        assert done.returncode == 1
        assert done.stderr.startswith(f"pod: {reason}")
        assert len(done.stderr.splitlines()) == 1


def test_what_moves_nothing_is_no_transaction(books: Books) -> None:
    before = books.text("beancount")
    member = books.membership.member_id
    books.ledger.append(HoldOpened(session_id(99), member, KEY, MODEL, 5, 10**14, 1))
    books.ledger.append(HoldVoided(session_id(99), VoidReason.CANCELLED))
    assert books.text("beancount") == before


@pytest.mark.parametrize(
    ("microcredits", "text"),
    [
        (0, "0.000000"),
        (1, "0.000001"),
        (-1, "-0.000001"),
        (-1_500_000, "-1.500000"),
        (2**60, "1152921504606.846976"),
    ],
)
def test_amounts_are_exact(microcredits: int, text: str) -> None:
    assert exact_credits(microcredits) == text


def test_since_is_a_day_or_a_while() -> None:
    assert parse_since("1970-01-02", 0) == 86_400_000
    assert parse_since("1970-01-01T01:00+01:00", 0) == 0
    assert parse_since("2h", 7_300) == 100_000
    with pytest.raises(UserError, match="--since must be"):
        parse_since("soon", 0)
