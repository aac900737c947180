"""The head's receipts of one session: when to sign, what to sign, what came back co-signed.

Pure but for the signature: it neither sends nor stores. Every stage gets a cumulative receipt for the prompt
and the first output token, one after each `SIGN_EVERY_NUM_TOKENS`, and one for exactly what was delivered at
the end.
"""

from __future__ import annotations

from ledger.rate_card import price
from ledger.receipt import (
    Receipt,
    ReceiptError,
    Sign,
    SignedReceipt,
    expected_amount,
    sign_as_head,
    verify_stage,
)
from node.links.frames import SignReceipt
from node.sessions.terms import SessionTerms

SIGN_EVERY_NUM_TOKENS = 64


class SessionReceipts:
    """Signs for the paying member; keeps the newest co-signed receipt of each stage."""

    def __init__(self, pod: bytes, terms: SessionTerms, sign: Sign) -> None:
        self._pod = pod
        self._terms = terms
        self._num_cached_tokens = 0
        self._sign = sign
        self._sequence = 0
        self._num_signed_tokens = 0
        # Signed and not yet co-signed, by stage and sequence.
        self._pending: dict[tuple[int, int], Receipt] = {}
        self._co_signed: dict[int, SignedReceipt] = {}

    @property
    def num_signed_tokens(self) -> int:
        return self._num_signed_tokens

    @property
    def num_cached_tokens(self) -> int:
        return self._num_cached_tokens

    def begin(self, num_cached_tokens: int) -> None:
        """So much of the prompt was in the caches of all stages; of one that is not charged for, nothing."""
        self._num_cached_tokens = min(num_cached_tokens, self._terms.num_charged_prompt_tokens)

    def is_due(self, num_output_tokens: int) -> bool:
        num_new_tokens = num_output_tokens - self._num_signed_tokens
        return num_new_tokens >= (SIGN_EVERY_NUM_TOKENS if self._num_signed_tokens else 1)

    def sign(self, num_output_tokens: int) -> list[SignReceipt]:
        """One frame per stage, in route order, for the prompt and `num_output_tokens`."""
        self._sequence += 1
        self._num_signed_tokens = num_output_tokens
        return [self._sign_one(index, num_output_tokens) for index in range(len(self._terms.route))]

    def _sign_one(self, stage_index: int, num_output_tokens: int) -> SignReceipt:
        terms = self._terms
        stage = terms.route[stage_index]
        num_parameters = terms.manifest.stage_num_parameters(stage.start_layer, stage.end_layer)
        counts = terms.num_charged_prompt_tokens, self._num_cached_tokens, num_output_tokens
        receipt = Receipt(
            pod=self._pod,
            session=terms.session,
            stage_index=stage_index,
            head=terms.head,
            payer=terms.payer,
            key_id=terms.key_id,
            stage=stage.node,
            model=terms.model,
            start_layer=stage.start_layer,
            end_layer=stage.end_layer,
            num_parameters=num_parameters,
            rate_card_version=terms.rate_card.version,
            sequence=self._sequence,
            num_prompt_tokens=counts[0],
            num_cached_tokens=counts[1],
            num_output_tokens=counts[2],
            amount_microcredits=price(terms.rate_card, num_parameters, *counts),
        )
        assert receipt.amount_microcredits == expected_amount(receipt, terms.rate_card)
        self._pending[stage_index, receipt.sequence] = receipt
        return SignReceipt(terms.session, sign_as_head(receipt, self._sign).encode())

    def accept(self, raw: bytes) -> None:
        """Take a stage's co-signed receipt. One that is not ours, changed or unsigned counts for nothing."""
        try:
            signed = SignedReceipt.decode(raw)
            verify_stage(signed)
        except ReceiptError:
            return
        receipt = signed.receipt
        known = self._co_signed.get(receipt.stage_index)
        is_newer = known is None or known.receipt.sequence < receipt.sequence
        # An older one may come late, and be the last of a stage that is gone.
        if self._pending.pop((receipt.stage_index, receipt.sequence), None) == receipt and is_newer:
            self._co_signed[receipt.stage_index] = signed

    def is_co_signed(self, stage_index: int) -> bool:
        """Whether that stage has co-signed the newest receipt."""
        signed = self._co_signed.get(stage_index)
        return signed is not None and signed.receipt.sequence == self._sequence

    def co_signed(self) -> tuple[SignedReceipt, ...]:
        return tuple(self._co_signed[index] for index in sorted(self._co_signed))
