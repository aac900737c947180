"""What one session was agreed on: who pays, which model over which route, how to sample.

Together with the tokens so far this is all that a replay over another route needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from ledger.entry import HoldOpened
from ledger.rate_card import RateCard, price
from node.links.frames import OpenSession, Sampling, Stage
from node.models.manifest import Manifest

# The hold outlives the session, so that a stage never works against an expired one.
HOLD_GRACE_S = 60


@dataclass(frozen=True, slots=True)
class SessionTerms:
    """`deadline_ms` is wall-clock: after it every stage may forget the session and the hold expires.

    Of a replay, the last `num_output_tokens_before` prompt ids are output of earlier attempts. Those were
    paid for with the prompt: this one charges only for what is new. `authorization` is the payer's signature
    under the hold; empty when the head's own member pays.
    """

    session: bytes
    head: bytes
    payer: bytes
    key_id: bytes
    model: bytes
    manifest: Manifest
    route: tuple[Stage, ...]
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    rate_card: RateCard
    deadline_ms: int
    num_output_tokens_before: int = 0
    prefix_hashes: tuple[bytes, ...] = ()
    max_num_draft_tokens: int = 0
    authorization: bytes = b""

    @property
    def is_replay(self) -> bool:
        return self.num_output_tokens_before > 0

    @property
    def max_num_new_tokens(self) -> int:
        return self.sampling.max_num_output_tokens - self.num_output_tokens_before

    @property
    def num_charged_prompt_tokens(self) -> int:
        return 0 if self.is_replay else len(self.prompt_ids)

    def worst_case_microcredits(self) -> int:
        """The price if every allowed output token is made, over any route; above 0 for the smallest model."""
        return worst_case_microcredits(
            self.rate_card, self.manifest, self.num_charged_prompt_tokens, self.max_num_new_tokens
        )

    def hold(self) -> HoldOpened:
        return HoldOpened(
            session=self.session,
            payer=self.payer,
            key_id=self.key_id,
            model=self.model,
            amount_microcredits=self.worst_case_microcredits(),
            expires_at_ms=self.deadline_ms + HOLD_GRACE_S * 1000,
            rate_card_version=self.rate_card.version,
            authorization=self.authorization,
        )

    def open_frame(self, stage_index: int) -> OpenSession:
        """Prompt ids go to the first stage, only here, and to the last if it must know them to sample."""
        is_last = stage_index == len(self.route) - 1
        last_needs_ids = is_last and self.sampling.needs_prompt(self.num_output_tokens_before)
        return OpenSession(
            session=self.session,
            model=self.model,
            route=self.route,
            stage_index=stage_index,
            head=self.head,
            payer=self.payer,
            key_id=self.key_id,
            hold_microcredits=self.worst_case_microcredits(),
            num_prompt_tokens=len(self.prompt_ids),
            sampling=self.sampling,
            deadline_ms=self.deadline_ms,
            rate_card_version=self.rate_card.version,
            num_output_tokens_before=self.num_output_tokens_before,
            prompt_ids=self.prompt_ids if stage_index == 0 or last_needs_ids else (),
            prefix_hashes=self.prefix_hashes,
            max_num_draft_tokens=self.max_num_draft_tokens,
            authorization=self.authorization,
        )


def worst_case_microcredits(
    rate_card: RateCard, manifest: Manifest, num_prompt_tokens: int, max_num_new_tokens: int
) -> int:
    num_layers = manifest.num_layers
    num_parameters = manifest.stage_num_parameters(0, num_layers)
    # Each of at most `num_layers` stages is rounded by less than one microcredit.
    return price(rate_card, num_parameters, num_prompt_tokens, 0, max_num_new_tokens) + num_layers
