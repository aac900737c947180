"""`pod ledger`: balances, recent requests, verification."""

from __future__ import annotations

import asyncio

from node.books_view import (
    AccountRow,
    account_rows,
    frozen_names,
    member_name,
    model_name,
    session_route_text,
    sum_microcredits,
)
from node.office import Office
from node.operations.arguments import Arguments, Result, TellProgress

MAX_NUM_RECENT = 30


def account_result(row: AccountRow) -> Result:
    return {
        "balance_microcredits": row.balance_microcredits,
        "num_served_tokens": row.num_served_tokens,
        "num_consumed_tokens": row.num_consumed_tokens,
        "earned_microcredits": row.totals.microcredits_earned,
        "spent_microcredits": row.totals.microcredits_spent,
        "dividends_microcredits": row.totals.microcredits_dividends,
    }


async def ledger(office: Office, _arguments: Arguments, _tell: TellProgress) -> Result:
    roster = office.membership.roster
    rows = await office.ledger.run(lambda books: account_rows(books, roster))
    books = office.ledger.ledger
    return {
        "accounts": [{"name": row.name, "role": row.role, **account_result(row)} for row in rows],
        "sum_microcredits": sum_microcredits(rows),
        "num_entries": books.num_entries(),
        "num_open_holds": len(books.open_holds()),
        "digest": books.digest().hex(),
        "recent": [
            {
                "session": summary.session.hex(),
                "time_ms": summary.opened_ms or 0,
                "member": member_name(roster, summary.payer),
                "model": model_name(roster, summary.model),
                "route": session_route_text(roster, summary),
                "num_prompt_tokens": summary.num_prompt_tokens,
                "num_output_tokens": summary.num_output_tokens,
                "amount_microcredits": summary.amount_microcredits,
                "state": summary.state.value,
            }
            for summary in books.recent_sessions(MAX_NUM_RECENT)
        ],
    }


async def ledger_verify(office: Office, _arguments: Arguments, _tell: TellProgress) -> Result:
    books = office.ledger.ledger
    violations = await asyncio.to_thread(books.verify)
    roster = office.membership.roster
    total = sum(books.balances().values())
    return {
        "ok": not violations and total == 0,
        "num_entries": books.num_entries(),
        "sum_microcredits": total,
        "violations": [str(violation) for violation in violations],
        "frozen": frozen_names(books, roster),
    }
