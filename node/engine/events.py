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


EngineEvent = ReceiptHeld | SessionEnded
