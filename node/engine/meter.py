"""A stage's own count of the work it did for one session, and the receipts it co-signs against that count.

A row at position p is prompt work when p is in the prompt, and yields an output token when p is the prompt's
last or later: so every stage of a route counts the same, and no more than it computed. Prompt rows that were
in the cache count as cached. A replay's prompt was paid for in an earlier session: none of it counts again.

Rows of guesses count like others until the next input shows which came true; from then on the others never
were. Of the last input's guesses only the head, which was sent the tokens, knows: a receipt may stand at any
count up to all of them, which is at most that many tokens more than were kept. What is charged is what the
head signs, and a head signs for the tokens it was sent.
"""

from __future__ import annotations

from ledger.rate_card import RateCard
from ledger.receipt import (
    Receipt,
    ReceiptError,
    Sign,
    SignedReceipt,
    WorkCount,
    WrongTerms,
    check_against_count,
    co_sign,
    verify_head,
)
from node.links.frames import OpenSession

# With more output unsigned a session waits for its head. The first receipt is for the prompt too, so until
# then it is less: these and the prompt are all that a stage can lose by one session.
MAX_NUM_UNSIGNED_TOKENS = 256
MAX_NUM_UNSIGNED_FIRST_TOKENS = 64


class Meter:
    def __init__(self, opening: OpenSession, pod: bytes, num_parameters: int, rate_card: RateCard) -> None:
        self._opening = opening
        self._pod = pod
        self._num_parameters = num_parameters
        self._rate_card = rate_card
        self._last: Receipt | None = None
        self._last_raw = b""
        self._has_repeated = False
        self._is_replay = opening.num_output_tokens_before > 0
        self._prompt_end = opening.num_prompt_tokens
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_output_tokens = 0
        self.num_signed_output_tokens = 0
        self._num_open_drafts = 0

    def begin(self, num_cached_tokens: int) -> None:
        """The KV of the first `num_cached_tokens` is here already."""
        if not self._is_replay:
            self.num_prompt_tokens = self.num_cached_tokens = num_cached_tokens

    @property
    def num_kept_output_tokens(self) -> int:
        """Without the guesses that nobody has said came true."""
        return max(self.num_output_tokens - self._num_open_drafts, self.num_signed_output_tokens)

    @property
    def is_at_limit(self) -> bool:
        """Nothing more before the head has signed."""
        limit = MAX_NUM_UNSIGNED_TOKENS if self.num_signed_output_tokens else MAX_NUM_UNSIGNED_FIRST_TOKENS
        return self.num_output_tokens - self.num_signed_output_tokens > limit

    @property
    def num_computed_tokens(self) -> int:
        """Prompt that was not in the cache, and output: what a head has to sign for."""
        return self.num_prompt_tokens - self.num_cached_tokens + self.num_kept_output_tokens

    @property
    def num_signed_tokens(self) -> int:
        last = self._last
        if last is None:
            return 0
        return last.num_prompt_tokens - last.num_cached_tokens + last.num_output_tokens

    @property
    def last_receipt(self) -> bytes:
        """The newest that was co-signed here, encoded; empty when there is none."""
        return self._last_raw

    def count(self, position: int, num_tokens: int, num_drafts: int = 0) -> None:
        """`num_tokens` rows from `position` on went through the layers, the last `num_drafts` of guesses."""
        prompt_end = self._prompt_end
        end = position + num_tokens
        if position < prompt_end and not self._is_replay:
            self.num_prompt_tokens += min(end, prompt_end) - position
        self.num_output_tokens = max(0, end - (prompt_end - 1))
        self._num_open_drafts = num_drafts

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
            raise WrongTerms(str(error)) from error
        check_against_count(signed.receipt, self._work())
        self._last, self._has_repeated = signed.receipt, is_repeat
        self.num_signed_output_tokens = signed.receipt.num_output_tokens
        self._last_raw = co_sign(signed, sign).encode()
        return self._last_raw

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
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            last=self._last,
        )
