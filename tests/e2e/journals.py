"""What a node's journal says, read from its file: no node is asked."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path

from ledger.entry import Entry, HoldOpened, HoldSettled, HoldVoided, ReceiptClaimed, decode_entry
from ledger.receipt import Receipt


@dataclass
class Told:
    """Everything that entries say of one session."""

    opened: HoldOpened | None = None
    endings: list[HoldSettled | HoldVoided] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)
    claims: list[Receipt] = field(default_factory=list)


def entries_of(home: Path) -> list[Entry]:
    with contextlib.closing(sqlite3.connect(home / "ledger.sqlite")) as db:
        return [decode_entry(raw) for (raw,) in db.execute("select raw from entries order by rowid")]


def sessions_of(home: Path) -> dict[bytes, Told]:
    told: dict[bytes, Told] = {}
    for entry in entries_of(home):
        match entry.body:
            case HoldOpened(session=session) as opened:
                told.setdefault(session, Told()).opened = opened
            case HoldSettled(session=session, receipts=receipts) as ending:
                told.setdefault(session, Told()).endings.append(ending)
                told[session].receipts += [signed.receipt for signed in receipts]
            case HoldVoided(session=session) as ending:
                told.setdefault(session, Told()).endings.append(ending)
            case ReceiptClaimed(receipt=signed):
                told.setdefault(signed.receipt.session, Told()).claims.append(signed.receipt)
            case _:
                pass
    return told
