"""Audits of a journal, each a function that returns violations and never raises.

They start from the raw stored entries and trust nothing else: not the columns beside them, not the
projection in memory. A violation names the entry it found, so that people can look at it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from ledger.books import Books, UnknownPartyError
from ledger.directory import Directory
from ledger.entry import FIRST_PREV_HASH, Entry, EntryError, HoldOpened, HoldSettled, HoldVoided, decode_entry
from ledger.journal import Journal, Record
from ledger.rules import EntryRefused, check_entry
from ledger.session_record import Hold


@dataclass(frozen=True, slots=True, order=True)
class Violation:
    """Something in the stored journal that no honest node writes."""

    author: bytes
    index: int
    reason: str

    def __str__(self) -> str:
        return f"entry {self.index} of {self.author.hex()[:8]}: {self.reason}"


@dataclass(slots=True)
class Evidence:
    """The stored records, decoded where they can be."""

    pod: bytes
    directory: Directory
    records: list[Record] = field(default_factory=list)
    entries: list[tuple[Record, Entry]] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)


Audit = Callable[[Evidence], Sequence[Violation]]


def verify_journal(journal: Journal, pod: bytes, directory: Directory) -> list[Violation]:
    """Run every audit; an empty list means that all signatures, chains, receipts and sums are right."""
    evidence = Evidence(pod, directory)
    for record in journal.iterate():
        evidence.records.append(record)
        try:
            evidence.entries.append((record, decode_entry(record.raw)))
        except EntryError as error:
            evidence.violations.append(Violation(record.author, record.index, str(error)))
    found = set(evidence.violations)
    for audit in AUDITS:
        found.update(audit(evidence))
    return sorted(found)


def audit_places(evidence: Evidence) -> list[Violation]:
    """What is stored beside an entry is what the entry says."""
    violations = [
        Violation(record.author, record.index, "its bytes are not those of its stored hash")
        for record in evidence.records
        if sha256(record.raw).digest() != record.hash
    ]
    for record, entry in evidence.entries:
        if (record.author, record.index, record.prev_hash) != (entry.author, entry.index, entry.prev_hash):
            violations.append(_violation(record, "it is stored in another entry's place"))
    return violations


def audit_rules(evidence: Evidence) -> list[Violation]:
    """Signatures, receipts, prices and authority of every entry."""
    holds: dict[tuple[bytes, bytes], list[Hold]] = {}
    for record, entry in evidence.entries:
        if isinstance(entry.body, HoldOpened):
            hold = Hold.of(record.author, entry.body, entry.time_ms)
            holds.setdefault((record.author, entry.body.session), []).append(hold)
    violations: list[Violation] = []
    for record, entry in evidence.entries:
        try:
            check_entry(
                entry,
                evidence.pod,
                evidence.directory,
                lambda author, session: holds.get((author, session), ()),
            )
        except EntryRefused as refusal:
            violations.append(_violation(record, str(refusal)))
    return violations


def audit_chains(evidence: Evidence) -> list[Violation]:
    """Every entry follows one that is there, and no two follow the same one."""
    places: dict[tuple[bytes, int], set[bytes]] = {}
    for record in evidence.records:
        places.setdefault((record.author, record.index), set()).add(record.hash)
    siblings = Counter((record.author, record.index, record.prev_hash) for record in evidence.records)
    violations = [
        Violation(author, index, f"fork: {num_entries} entries with this index")
        for (author, index, _), num_entries in siblings.items()
        if num_entries > 1
    ]
    for record in evidence.records:
        if record.index == 0:
            follows = record.prev_hash == FIRST_PREV_HASH
        else:
            follows = record.prev_hash in places.get((record.author, record.index - 1), ())
        if not follows:
            violations.append(_violation(record, "the entry before it is missing or another one"))
    return violations


def audit_resolutions(evidence: Evidence) -> list[Violation]:
    """A hold is opened once, and settled or voided at most once."""
    opened: dict[tuple[bytes, bytes], Record] = {}
    resolved: dict[tuple[bytes, bytes], Record] = {}
    violations: list[Violation] = []
    for record, entry in sorted(evidence.entries, key=lambda pair: (pair[0].author, pair[0].index)):
        match entry.body:
            case HoldOpened(session=session):
                seen, word = opened, "opened"
            case HoldSettled(session=session) | HoldVoided(session=session):
                seen, word = resolved, "resolved"
            case _:
                continue
        first = seen.setdefault((record.author, session), record)
        if first is not record and first.index != record.index:
            violations.append(_violation(record, f"its hold was already {word} by entry {first.index}"))
    return violations


def audit_sums(evidence: Evidence) -> list[Violation]:
    """After each entry the accounts sum to 0."""
    books = Books(evidence.directory)
    total = 0
    violations: list[Violation] = []
    for record, entry in evidence.entries:
        try:
            total += sum(posting.amount_microcredits for posting in books.apply(entry))
        except UnknownPartyError as error:
            violations.append(_violation(record, str(error)))
        if total != 0:
            violations.append(_violation(record, f"after it the accounts sum to {total}"))
    if sum(books.balances().values()) != 0 and evidence.records:
        violations.append(_violation(evidence.records[-1], "the balances do not sum to 0"))
    return violations


AUDITS: tuple[Audit, ...] = (audit_places, audit_rules, audit_chains, audit_resolutions, audit_sums)


def _violation(record: Record, reason: str) -> Violation:
    return Violation(record.author, record.index, reason)
