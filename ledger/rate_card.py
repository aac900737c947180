"""The rate card (versioned prices) and `price`: tokens through parameters, in integer microcredits.

One credit is 10^9 parameter-tokens (one token through a model of a billion parameters), so one microcredit
is 1000 parameter-tokens. It does not know who pays whom.
"""

from __future__ import annotations

from dataclasses import dataclass

from ledger import canonical

MICROCREDITS_PER_CREDIT = 1_000_000
PARAMETER_TOKENS_PER_MICROCREDIT = 1_000
PER_MILLE = 1_000
_MAX_WEIGHT_PER_MILLE = 1_000_000
_MAX_MICROCREDITS = 2**53
_MAX_NUM_BYTES = 128
_FORMAT = 1


class RateCardError(ValueError):
    """The prices do not add up, or the bytes are no rate card."""


@dataclass(frozen=True, slots=True)
class RateCard:
    """Prices of one version; a version is never changed, a new one is published.

    `levy_per_mille` of what a stage earns goes to the treasury. `credit_line_microcredits` is how far below
    zero a balance may be before a contended pod refuses.
    """

    version: int
    prompt_weight_per_mille: int
    cached_weight_per_mille: int
    output_weight_per_mille: int
    starter_grant_microcredits: int
    credit_line_microcredits: int
    levy_per_mille: int

    def __post_init__(self) -> None:
        weights = (
            self.prompt_weight_per_mille,
            self.cached_weight_per_mille,
            self.output_weight_per_mille,
        )
        if not 1 <= self.version < 2**32:
            raise RateCardError("a rate card's version is at least 1")
        if not all(0 <= weight <= _MAX_WEIGHT_PER_MILLE for weight in weights):
            raise RateCardError(f"a weight is from 0 to {_MAX_WEIGHT_PER_MILLE} per mille")
        if not 0 <= self.levy_per_mille <= PER_MILLE:
            raise RateCardError("the levy is from 0 to 1000 per mille")
        amounts = (self.starter_grant_microcredits, self.credit_line_microcredits)
        if not all(0 <= amount <= _MAX_MICROCREDITS for amount in amounts):
            raise RateCardError(f"an amount is from 0 to {_MAX_MICROCREDITS} microcredits")

    def levy(self, amount_microcredits: int) -> int:
        """The treasury's share of `amount_microcredits`, rounded down (in favour of who served)."""
        return amount_microcredits * self.levy_per_mille // PER_MILLE

    def encode(self) -> bytes:
        return canonical.encode(
            (
                _FORMAT,
                self.version,
                self.prompt_weight_per_mille,
                self.cached_weight_per_mille,
                self.output_weight_per_mille,
                self.starter_grant_microcredits,
                self.credit_line_microcredits,
                self.levy_per_mille,
            )
        )

    @staticmethod
    def decode(raw: bytes) -> RateCard:
        """Raise RateCardError unless `raw` is exactly the encoding of a sound rate card."""
        try:
            reader = canonical.decode(raw, _MAX_NUM_BYTES)
            reader.expect_num_fields(8)
            card = RateCard(*(reader.uint(key) for key in range(1, 8)))
        except canonical.CanonicalError as error:
            raise RateCardError(f"not a rate card: {error}") from error
        if card.encode() != raw:
            raise RateCardError("not a rate card of format 1 in canonical form")
        return card


DEFAULT_RATE_CARD = RateCard(
    version=1,
    prompt_weight_per_mille=1_000,
    cached_weight_per_mille=100,
    output_weight_per_mille=1_000,
    starter_grant_microcredits=1_000 * MICROCREDITS_PER_CREDIT,
    credit_line_microcredits=500 * MICROCREDITS_PER_CREDIT,
    levy_per_mille=20,
)


def price(
    card: RateCard,
    num_parameters: int,
    num_prompt_tokens: int,
    num_cached_tokens: int,
    num_output_tokens: int,
) -> int:
    """Microcredits for one stage of `num_parameters`; `num_prompt_tokens` includes the cached ones.

    Rounded down once, on the cumulative counts: a receipt is never above the work, and splitting work over
    more receipts changes nothing. Raises ValueError for counts that cannot be.
    """
    if min(num_parameters, num_prompt_tokens, num_cached_tokens, num_output_tokens) < 0:
        raise ValueError("counts are never negative")
    if num_cached_tokens > num_prompt_tokens:
        raise ValueError("more cached tokens than prompt tokens")
    weighted_tokens = (
        (num_prompt_tokens - num_cached_tokens) * card.prompt_weight_per_mille
        + num_cached_tokens * card.cached_weight_per_mille
        + num_output_tokens * card.output_weight_per_mille
    )
    return num_parameters * weighted_tokens // (PER_MILLE * PARAMETER_TOKENS_PER_MICROCREDIT)
