"""A stage's own count of the work it did for one session, and the receipts it co-signs against that count.

A row at position p is prompt work when p is in the prompt, and yields an output token when p is the prompt's
last or later: so every stage of a route counts the same, and no more than it computed.
"""

from __future__ import annotations

from ledger.rate_card import RateCard
from ledger.receipt import (
    Dispute,
    Receipt,
    ReceiptError,
    Sign,
    SignedReceipt,
    WorkCount,
    check_against_count,
    co_sign,
    verify_head,
)
from node.links.frames import OpenSession


class Meter:
    def __init__(self, opening: OpenSession, pod: bytes, num_parameters: int, rate_card: RateCard) -> None:
        self._opening = opening
        self._pod = pod
        self._num_parameters = num_parameters
        self._rate_card = rate_card
        self._last: Receipt | None = None
        self._has_repeated = False
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0

    @property
    def num_unsigned_output_tokens(self) -> int:
        return self.num_output_tokens - (self._last.num_output_tokens if self._last else 0)

    def count(self, position: int, num_tokens: int) -> None:
        """`num_tokens` rows from `position` on went through the layers."""
        end, num_prompt_tokens = position + num_tokens, self._opening.num_prompt_tokens
        self.num_prompt_tokens += max(0, min(end, num_prompt_tokens) - position)
        self.num_output_tokens += max(0, end - max(position, num_prompt_tokens - 1))

    def co_sign(self, raw: bytes, sign: Sign) -> bytes | None:
        """The receipt with this stage's signature; None for one that says nothing new.

        Raises Dispute when it is not the own count.
        """
        try:
            signed = SignedReceipt.decode(raw)
            is_repeat = self._is_repeat(signed.receipt)
            if is_repeat and self._has_repeated:
                return None
            verify_head(signed)
        except ReceiptError as error:
            raise Dispute(str(error)) from error
        check_against_count(signed.receipt, self._work())
        self._last, self._has_repeated = signed.receipt, is_repeat
        return co_sign(signed, sign).encode()

    def _is_repeat(self, receipt: Receipt) -> bool:
        """No more tokens than the last. The first such is the one that a head closes a session with."""
        last = self._last
        return last is not None and (receipt.num_prompt_tokens, receipt.num_output_tokens) == (
            last.num_prompt_tokens,
            last.num_output_tokens,
        )

    def _work(self) -> WorkCount:
        opening = self._opening
        stage = opening.route[opening.stage_index]
        return WorkCount(
            pod=self._pod,
            session=opening.session,
            stage_index=opening.stage_index,
            head=opening.head,
            payer=opening.payer,
            key_id=opening.key_id,
            stage=stage.node,
            model=opening.model,
            start_layer=stage.start_layer,
            end_layer=stage.end_layer,
            num_parameters=self._num_parameters,
            rate_card=self._rate_card,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=0,
            num_output_tokens=self.num_output_tokens,
            last=self._last,
        )
