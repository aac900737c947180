"""The ledger for other programs: CSV, JSON lines, beancount. Amounts are exact, down to the microcredit.

Pure: transactions and the roster's names in, lines of text out.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from ledger.entry import ISSUANCE, TREASURY
from ledger.transactions import Transaction, Transactions
from node.books_view import member_name, model_name, node_name
from pod.roster.roster import Roster

CURRENCY = "CREDIT"
_MICROCREDITS_PER_CREDIT = 1_000_000
# The last day after which there is one more, for the balances.
_LAST_DAY = datetime(9999, 12, 30, tzinfo=UTC)
_FIRST_DAY = "1970-01-01"
_CSV_COLUMNS = (
    *("time", "type", "account", "amount_credits", "amount_microcredits", "account_id"),
    *("session", "payer", "model", "node", "index", "entry"),
)


@dataclass(frozen=True, slots=True)
class Filters:
    """What to leave out: None leaves out nothing. `member` and `model` are ids."""

    since_ms: int | None = None
    member: bytes | None = None
    model: bytes | None = None

    def lets(self, transaction: Transaction) -> bool:
        return (
            (self.since_ms is None or transaction.entry.time_ms >= self.since_ms)
            and (self.member is None or transaction.concerns(self.member))
            and (self.model is None or transaction.model == self.model)
        )

    @property
    def keep_balances(self) -> bool:
        """Whether what is let through still adds up to what everybody has."""
        return self.member is None and self.model is None


def account_name(roster: Roster, account: bytes) -> str:
    return account.decode() if account in (TREASURY, ISSUANCE) else member_name(roster, account)


def exact_credits(microcredits: int) -> str:
    """`-1.500000`: no rounding, no thousands separators."""
    whole, rest = divmod(abs(microcredits), _MICROCREDITS_PER_CREDIT)
    return f"{'-' if microcredits < 0 else ''}{whole}.{rest:06d}"


def _time(transaction: Transaction) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=transaction.entry.time_ms)


def _facts(roster: Roster, transaction: Transaction) -> dict[str, str | int]:
    """What is said of an entry in every format."""
    entry = transaction.entry
    facts: dict[str, str | int] = {
        "time": _time(transaction).isoformat(timespec="milliseconds"),
        "type": type(entry.body).__name__,
        "node": node_name(roster, entry.author),
        "index": entry.index,
        "entry": entry.hash.hex(),
    }
    if transaction.session:
        facts["session"] = transaction.session.hex()
    if transaction.payer:
        facts["payer"] = member_name(roster, transaction.payer)
    if transaction.model:
        facts["model"] = model_name(roster, transaction.model)
    for name in ("num_prompt_tokens", "num_cached_tokens", "num_output_tokens"):
        if (count := getattr(entry.body, name, None)) is not None:
            facts[name] = count
    return facts


def jsonl_lines(transactions: Transactions, roster: Roster, filters: Filters) -> Iterator[str]:
    """One object per entry, also of those that moved nothing."""
    for transaction in filter(filters.lets, transactions.iterate()):
        postings = [
            {
                "account": account_name(roster, posting.account),
                "account_id": posting.account.hex(),
                "amount_microcredits": posting.amount_microcredits,
            }
            for posting in transaction.postings
        ]
        yield json.dumps({**_facts(roster, transaction), "postings": postings}, ensure_ascii=False) + "\n"


def csv_lines(transactions: Transactions, roster: Roster, filters: Filters) -> Iterator[str]:
    """One row per posting, after a row of names."""
    yield _csv_row(_CSV_COLUMNS)
    for transaction in filter(filters.lets, transactions.iterate()):
        facts = _facts(roster, transaction)
        for posting in transaction.postings:
            row: Mapping[str, str | int] = facts | {
                "account": account_name(roster, posting.account),
                "amount_credits": exact_credits(posting.amount_microcredits),
                "amount_microcredits": posting.amount_microcredits,
                "account_id": posting.account.hex(),
            }
            yield _csv_row(tuple(_csv_value(row.get(name, "")) for name in _CSV_COLUMNS))


def _csv_value(value: str | int) -> str | int:
    """A name that a spreadsheet would take for a formula is made text."""
    is_formula = isinstance(value, str) and value[:1] in ("=", "+", "@", "\t", "-")
    return f"'{value}" if is_formula and not re.fullmatch(r"-[0-9.]+", str(value)) else value


def _csv_row(values: tuple[str | int, ...]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(values)
    return line.getvalue()


def beancount_lines(transactions: Transactions, roster: Roster, filters: Filters) -> Iterator[str]:
    """Transactions and, unless a filter broke them up, everybody's balance at the end to check them by."""
    book = _Beancount(roster)
    yield f'option "title" {_quoted(f"gpu-pod {roster.name}")}\n'
    yield f"{_FIRST_DAY} commodity {CURRENCY}\n"
    for account in (TREASURY, ISSUANCE):
        yield from book.open(account)
    earlier: defaultdict[bytes, int] = defaultdict(int)
    last_day = datetime(1970, 1, 1, tzinfo=UTC)
    for transaction in transactions.iterate():
        if filters.keep_balances and not filters.lets(transaction):
            for posting in transaction.postings:
                earlier[posting.account] += posting.amount_microcredits
        elif filters.lets(transaction) and transaction.postings:
            last_day = max(last_day, min(_time(transaction), _LAST_DAY))
            yield from book.transaction(transaction)
    if filters.since_ms is not None and any(earlier.values()):
        since = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=filters.since_ms)
        last_day = max(last_day, min(since, _LAST_DAY))
        yield from book.opening(since, earlier)
    if filters.keep_balances:
        day = (last_day + timedelta(days=1)).strftime("%Y-%m-%d")
        for account, amount in transactions.balances().items():
            yield from book.open(account)
            yield f"{day} balance {book.name(account)} {exact_credits(amount)} ~ 0 {CURRENCY}\n"


class _Beancount:
    """Names accounts and opens each before it is used first; beancount itself sorts by day."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._names: dict[bytes, str] = {}

    def name(self, account: bytes) -> str:
        return self._names[account]

    def open(self, account: bytes) -> Iterator[str]:
        if account not in self._names:
            self._names[account] = self._new_name(account)
            yield f"{_FIRST_DAY} open {self._names[account]} {CURRENCY}\n"

    def _new_name(self, account: bytes) -> str:
        match account:
            case _ if account == TREASURY:
                return "Assets:Treasury"
            case _ if account == ISSUANCE:
                return "Equity:Issuance"
            case _:
                shown = re.sub(r"[^A-Za-z0-9]+", "-", member_name(self._roster, account)).strip("-")
                return (
                    f"Assets:Members:{shown[:1].upper()}{shown[1:]}{'-' if shown else ''}{account.hex()[:16]}"
                )

    def transaction(self, transaction: Transaction) -> Iterator[str]:
        for posting in transaction.postings:
            yield from self.open(posting.account)
        facts = _facts(self._roster, transaction)
        day = min(_time(transaction), _LAST_DAY).strftime("%Y-%m-%d")
        about = str(facts.get("payer", facts["node"]))
        yield f"\n{day} * {_quoted(about)} {_quoted(_narration(facts))}\n"
        for name in ("time", "entry", "node", "index", "session"):
            if name in facts:
                yield f"  {name}: {_quoted(str(facts[name]))}\n"
        for posting in transaction.postings:
            amount = exact_credits(posting.amount_microcredits)
            yield f"  {self.name(posting.account)}  {amount} {CURRENCY}\n"

    def opening(self, since: datetime, amounts: Mapping[bytes, int]) -> Iterator[str]:
        for account in amounts:
            yield from self.open(account)
        yield f'\n{min(since, _LAST_DAY).strftime("%Y-%m-%d")} * "What came before"\n'
        for account, amount in amounts.items():
            yield f"  {self.name(account)}  {exact_credits(amount)} {CURRENCY}\n"


def _narration(facts: Mapping[str, str | int]) -> str:
    tokens = "".join(
        f", {facts[f'num_{kind}_tokens']} {kind}"
        for kind in ("prompt", "output")
        if f"num_{kind}_tokens" in facts
    )
    model = f" {facts['model']}" if "model" in facts else ""
    return f"{facts['type']}{model}{tokens}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{" ".join(escaped.split())}"'


Lines = Callable[[Transactions, Roster, Filters], Iterator[str]]
FORMATS: Mapping[str, Lines] = {"csv": csv_lines, "jsonl": jsonl_lines, "beancount": beancount_lines}
