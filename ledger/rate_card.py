"""The rate card (versioned prices, rules of the treasury) and `price`: tokens through parameters, in integer
microcredits.

One credit is 10^9 parameter-tokens (one token through a model of a billion parameters), so one microcredit
is 1000 parameter-tokens. It does not know who pays whom, nor who may publish a card.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from hashlib import sha256

from ledger import canonical

MICROCREDITS_PER_CREDIT = 1_000_000
PARAMETER_TOKENS_PER_MICROCREDIT = 1_000
PER_MILLE = 1_000
MAX_WEIGHT_PER_MILLE = 1_000_000
MAX_CARD_MICROCREDITS = 2**53
MIN_DIVIDEND_PERIOD_S = 60
MAX_DIVIDEND_PERIOD_S = 366 * 86_400
MAX_NUMBER = 2**12 - 1
# A published version is its number in the high bits and a hash of what it says in the low ones.
_NUM_HASH_BITS = 20
_HASH_CONTEXT = b"gpu-pod rate card, v1\x00"
_MAX_NUM_BYTES = 128
_FORMAT = 2
# Of format 1, which has none of these fields, what it means is fixed: they have the values below.
_FIRST_FORMAT = 1
_NUM_FIRST_FIELDS = 7
_FIRST_DIVIDENDS_AND_FLOOR = (500, 7 * 86_400, 100)


class RateCardError(ValueError):
    """The prices do not add up, or the bytes are no rate card."""


@dataclass(frozen=True, slots=True)
class RateCard:
    """Prices of one version; a version is never changed, a new one is published.

    `levy_per_mille` of what a stage earns goes to the treasury, and `dividend_per_mille` of that levy back to
    the members active in the same `dividend_period_s`. `credit_line_microcredits` is how far below zero a
    balance may be before a contended pod refuses; `floor_per_mille` is the least weight in its queue.
    """

    version: int
    prompt_weight_per_mille: int
    cached_weight_per_mille: int
    output_weight_per_mille: int
    starter_grant_microcredits: int
    credit_line_microcredits: int
    levy_per_mille: int
    dividend_per_mille: int = _FIRST_DIVIDENDS_AND_FLOOR[0]
    dividend_period_s: int = _FIRST_DIVIDENDS_AND_FLOOR[1]
    floor_per_mille: int = _FIRST_DIVIDENDS_AND_FLOOR[2]

    def __post_init__(self) -> None:
        weights = (
            self.prompt_weight_per_mille,
            self.cached_weight_per_mille,
            self.output_weight_per_mille,
        )
        if not 1 <= self.version < 2**32:
            raise RateCardError("a rate card's version is at least 1")
        if not all(0 <= weight <= MAX_WEIGHT_PER_MILLE for weight in weights):
            raise RateCardError(f"a weight is from 0 to {MAX_WEIGHT_PER_MILLE} per mille")
        if not 0 <= self.levy_per_mille <= PER_MILLE:
            raise RateCardError("the levy is from 0 to 1000 per mille")
        if not 0 <= self.dividend_per_mille <= PER_MILLE:
            raise RateCardError("the dividends are from 0 to 1000 per mille of the levy")
        if not MIN_DIVIDEND_PERIOD_S <= self.dividend_period_s <= MAX_DIVIDEND_PERIOD_S:
            raise RateCardError(
                f"a dividend period is from {MIN_DIVIDEND_PERIOD_S} to {MAX_DIVIDEND_PERIOD_S} seconds"
            )
        if not 1 <= self.floor_per_mille <= PER_MILLE:
            raise RateCardError("the floor is from 1 to 1000 per mille")
        amounts = (self.starter_grant_microcredits, self.credit_line_microcredits)
        if not all(0 <= amount <= MAX_CARD_MICROCREDITS for amount in amounts):
            raise RateCardError(f"an amount is from 0 to {MAX_CARD_MICROCREDITS} microcredits")

    def levy(self, amount_microcredits: int) -> int:
        """The treasury's share of `amount_microcredits`, rounded down (in favour of who served)."""
        return amount_microcredits * self.levy_per_mille // PER_MILLE

    def dividend(self, levy_microcredits: int) -> int:
        """What of a levy is paid out again, rounded down."""
        return levy_microcredits * self.dividend_per_mille // PER_MILLE

    @property
    def number(self) -> int:
        """Which policy of its pod this is, counted by who published it; two of a partition may share one."""
        return self.version >> _NUM_HASH_BITS or self.version

    @property
    def name(self) -> str:
        """The version as people read it: `3-9f2c1`, or `1` for the card that every pod begins with."""
        if self.version >> _NUM_HASH_BITS == 0:
            return str(self.version)
        return f"{self.number}-{self.version & ((1 << _NUM_HASH_BITS) - 1):05x}"

    @property
    def is_named_by_content(self) -> bool:
        """Whether the version is the one that `numbered` gives to what this card says."""
        return self.version >> _NUM_HASH_BITS > 0 and self == self.numbered(self.number)

    def numbered(self, number: int) -> RateCard:
        """The same card as the pod's policy `number`, from 2 up.

        Its version depends on all it says. So two admins who cannot see each other and publish the same
        number have not published the same version; and a receipt, which names the version only, says more
        than a number that whoever publishes next might give to other prices.
        """
        if not 2 <= number <= MAX_NUMBER:
            raise RateCardError(f"a policy's number is from 2 to {MAX_NUMBER}")
        content = replace(self, version=1).encode()
        digest = int.from_bytes(sha256(_HASH_CONTEXT + content).digest(), "big")
        return replace(self, version=number << _NUM_HASH_BITS | digest >> (256 - _NUM_HASH_BITS))

    def encode(self) -> bytes:
        """In the first format that can say it, so that every card has one encoding."""
        values: tuple[int, ...] = astuple(self)
        if values[_NUM_FIRST_FIELDS:] == _FIRST_DIVIDENDS_AND_FLOOR:
            return canonical.encode((_FIRST_FORMAT, *values[:_NUM_FIRST_FIELDS]))
        return canonical.encode((_FORMAT, *values))

    @staticmethod
    def decode(raw: bytes) -> RateCard:
        """Raise RateCardError unless `raw` is exactly the encoding of a sound rate card."""
        try:
            reader = canonical.decode(raw, _MAX_NUM_BYTES)
            is_first = reader.uint(0) == _FIRST_FORMAT
            num_values = _NUM_FIRST_FIELDS + (0 if is_first else len(_FIRST_DIVIDENDS_AND_FLOOR))
            reader.expect_num_fields(1 + num_values)
            card = RateCard(*(reader.uint(key) for key in range(1, 1 + num_values)))
        except canonical.CanonicalError as error:
            raise RateCardError(f"not a rate card: {error}") from error
        if card.encode() != raw:
            raise RateCardError("not a rate card of a known format in canonical form")
        return card


# The version 1 that every pod begins with.
DEFAULT_RATE_CARD = RateCard(
    version=1,
    prompt_weight_per_mille=1_000,
    cached_weight_per_mille=100,
    output_weight_per_mille=1_000,
    starter_grant_microcredits=1_000 * MICROCREDITS_PER_CREDIT,
    credit_line_microcredits=500 * MICROCREDITS_PER_CREDIT,
    levy_per_mille=20,
    dividend_per_mille=500,
    dividend_period_s=7 * 86_400,
    floor_per_mille=100,
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
