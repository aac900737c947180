"""Picking the next token of each row. The random number is a hash of (seed, position) and every row is worked
on by itself, so a token depends on no batch, route or history: a replay after a failure continues with the
same tokens. Knows logits, not sessions.

Order, as vLLM has it: logit bias, minimum length, penalties (`sampling_edits.py`), temperature, min-p and
top-k, top-p (`sampling_cut.py`). Logprobs are those of the model's own logits, before all of that.

Rows are picked one after the other with numpy rather than all at once with torch: a row fits the processor's
nearest caches, a batch does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from node.engine.sampling_cut import Scores, Scratch, draw_token
from node.engine.sampling_edits import LogitEdits
from node.engine.sampling_logprobs import logprobs
from node.links.frames import FinishReason, Sampling

_PERSON = b"gpu-pod sampling"
NUM_RANDOM_BITS = 53
# Below this the likeliest token's lead is beyond float32; greedy, as in vLLM.
MIN_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to pick: it will stand at `position` and be output token number `num_output_tokens + 1`.

    `edits` are the session's, if its sampling has any; they know the tokens up to some earlier position, and
    `extra_ids` are those between: the guesses of this step that stand before this one.
    """

    sampling: Sampling
    position: int
    num_output_tokens: int
    edits: LogitEdits | None = None
    extra_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert self.edits is not None or not LogitEdits.are_needed(self.sampling)

    @property
    def is_greedy(self) -> bool:
        return self.sampling.temperature < MIN_TEMPERATURE

    @property
    def forbids_eos(self) -> bool:
        sampling = self.sampling
        return self.num_output_tokens < sampling.min_num_output_tokens and bool(sampling.eos_token_ids)

    @property
    def is_plain(self) -> bool:
        """Nothing but the row's highest logit is asked for."""
        return (
            self.is_greedy
            and self.edits is None
            and self.sampling.num_top_logprobs < 0
            and not self.forbids_eos
        )


@dataclass(frozen=True, slots=True)
class Pick:
    """What was picked; `logprob` and `top_logprobs` (likeliest first) as far as they were asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def uniform(seed: int, position: int) -> float:
    """In [0, 1), 53 bits, the same everywhere and always."""
    return _random_bits(seed, position) * 2.0**-NUM_RANDOM_BITS


class Sampler:
    """Keeps working memory from step to step: for one thread only."""

    def __init__(self) -> None:
        self._scratch = Scratch.of(0)

    def sample(self, logits_BV: Tensor, draws: Sequence[Draw]) -> list[Pick | None]:
        """One pick per row; None where the model gave NaN, infinity or nothing that may be picked.

        Rows are left as they are. Of equal logits the lowest id counts as the likeliest, on every device.
        """
        assert len(logits_BV) == len(draws)
        if logits_BV.device.type != "cpu" and all(draw.is_plain for draw in draws):
            return greedy_on_device(logits_BV)
        rows_BV: Scores = logits_BV.detach().float().cpu().numpy()
        return [self._pick(np.ascontiguousarray(row), draw) for row, draw in zip(rows_BV, draws, strict=True)]

    def _pick(self, raw_V: Scores, draw: Draw) -> Pick | None:
        token_id = int(raw_V.argmax())
        # numpy's argmax takes the first NaN for the highest, so this one number tells of any in the row.
        if not math.isfinite(raw_V[token_id]):
            return None
        if draw.is_plain:
            return Pick(token_id)
        scratch = self._scratch_for(len(raw_V))
        scores_V = raw_V
        if draw.edits is not None or draw.forbids_eos:
            scores_V = _edited(raw_V, draw, scratch.row_V)
            token_id = int(scores_V.argmax())
        top = float(scores_V[token_id])
        if not math.isfinite(top):
            return None
        sampling = draw.sampling
        if not draw.is_greedy:
            bits = _random_bits(sampling.seed, draw.position)
            token_id = draw_token(scores_V, top, sampling, bits, NUM_RANDOM_BITS, scratch)
        if sampling.num_top_logprobs < 0:
            return Pick(token_id)
        return Pick(token_id, *logprobs(raw_V, token_id, sampling.num_top_logprobs, scratch))

    def _scratch_for(self, vocab_size: int) -> Scratch:
        if len(self._scratch.row_V) != vocab_size:
            self._scratch = Scratch.of(vocab_size)
        return self._scratch


def greedy_on_device(logits_BV: Tensor) -> list[Pick | None]:
    """Only two numbers per row leave the device. argmax does not say which of equals it takes there."""
    top_B1 = logits_BV.amax(dim=-1, keepdim=True)
    ids_V = torch.arange(logits_BV.shape[1], device=logits_BV.device)
    ids_B = torch.where(logits_BV == top_B1, ids_V, logits_BV.shape[1]).amin(dim=-1)
    tops: list[float] = top_B1[:, 0].tolist()
    picks = zip(ids_B.tolist(), tops, strict=True)
    return [Pick(token_id) if math.isfinite(top) else None for token_id, top in picks]


def finish_reason(token_id: int, draw: Draw) -> FinishReason:
    if token_id in draw.sampling.eos_token_ids and not draw.sampling.ignore_eos:
        return FinishReason.STOP
    if draw.num_output_tokens + 1 >= draw.sampling.max_num_output_tokens:
        return FinishReason.LENGTH
    return FinishReason.NONE


def _random_bits(seed: int, position: int) -> int:
    counter = (seed % 2**64).to_bytes(8, "little") + position.to_bytes(8, "little")
    digest = blake2b(counter, digest_size=8, person=_PERSON).digest()
    return int.from_bytes(digest, "little") >> (64 - NUM_RANDOM_BITS)


def _edited(raw_V: Scores, draw: Draw, scores_V: Scores) -> Scores:
    np.copyto(scores_V, raw_V)
    if draw.edits is not None:
        draw.edits.apply(scores_V, draw.extra_ids)
    if draw.forbids_eos:
        scores_V[list(draw.sampling.eos_token_ids)] = -np.inf
    return scores_V
