"""What the engine tells its node besides frames, as plain values. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReceiptHeld:
    """A receipt this stage co-signed, encoded: its claim if the head vanishes."""

    session: bytes
    receipt: bytes


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """KV is free again. `reason` is empty when the head closed the session."""

    session: bytes
    model: bytes
    num_prompt_tokens: int
    num_output_tokens: int
    reason: str


@dataclass(frozen=True, slots=True)
class WorkDisputed:
    """A session that ended because its head did not sign, or signed for something else.

    `reason` is a `ledger.entry.DisputeReason`; `receipt` what the head sent, or the newest that was co-signed
    (encoded, may be empty). Nothing in it has been checked.
    """

    session: bytes
    reason: int
    receipt: bytes


EngineEvent = ReceiptHeld | SessionEnded | WorkDisputed
