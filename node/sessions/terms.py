"""What one session was agreed on: who pays, which model over which route, how to sample.

Together with the tokens so far this is all that a replay over another route needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from ledger.rate_card import RateCard, price
from node.links.frames import OpenSession, Sampling, Stage
from node.models.manifest import Manifest


@dataclass(frozen=True, slots=True)
class SessionTerms:
    """`deadline_ms` is wall-clock: after it every stage may forget the session and the hold expires."""

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

    def stage_price(self, stage: Stage, num_output_tokens: int) -> int:
        """Microcredits that `stage` earns for the prompt and `num_output_tokens`."""
        num_parameters = self.manifest.stage_num_parameters(stage.start_layer, stage.end_layer)
        return price(self.rate_card, num_parameters, len(self.prompt_ids), 0, num_output_tokens)

    def worst_case_microcredits(self) -> int:
        """The price if every allowed output token is made, over any route; above 0 for the smallest model."""
        num_layers = self.manifest.num_layers
        num_parameters = self.manifest.stage_num_parameters(0, num_layers)
        num_output_tokens = self.sampling.max_num_output_tokens
        whole = price(self.rate_card, num_parameters, len(self.prompt_ids), 0, num_output_tokens)
        # Each of at most `num_layers` stages is rounded by less than one microcredit.
        return whole + num_layers

    def open_frame(self, stage_index: int) -> OpenSession:
        """Prompt ids go to the first stage only, and only here."""
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
            prompt_ids=self.prompt_ids if stage_index == 0 else (),
        )
