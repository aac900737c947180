"""Picking the next token. The random number is a hash of (seed, position), so it depends on no batch, route
or history: a replay after a failure continues with the same tokens. Knows logits, not sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from node.links.frames import FinishReason, Sampling

_PERSON = b"gpu-pod sampling"


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to pick: it will stand at `position` and be output token number `num_output_tokens + 1`."""

    sampling: Sampling
    position: int
    num_output_tokens: int


def uniform(seed: int, position: int) -> float:
    """In [0, 1), 53 bits, the same everywhere and always."""
    counter = (seed % 2**64).to_bytes(8, "little") + position.to_bytes(8, "little")
    digest = blake2b(counter, digest_size=8, person=_PERSON).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits_BV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """One token id per row."""
    for row, draw in enumerate(draws):
        if draw.num_output_tokens < draw.sampling.min_num_output_tokens and draw.sampling.eos_token_ids:
            logits_BV[row, list(draw.sampling.eos_token_ids)] = float("-inf")
    token_ids: list[int] = logits_BV.argmax(dim=-1).tolist()
    for row, draw in enumerate(draws):
        if draw.sampling.temperature > 0:
            token_ids[row] = _sample_row(logits_BV[row], draw)
    return token_ids


def finish_reason(token_id: int, draw: Draw) -> FinishReason:
    if token_id in draw.sampling.eos_token_ids and not draw.sampling.ignore_eos:
        return FinishReason.STOP
    if draw.num_output_tokens + 1 >= draw.sampling.max_num_output_tokens:
        return FinishReason.LENGTH
    return FinishReason.NONE


def _sample_row(logits_V: Tensor, draw: Draw) -> int:
    """Invert the cumulative distribution, likeliest token first, at the draw's random number."""
    sampling = draw.sampling
    num_kept = min(sampling.top_k or logits_V.numel(), logits_V.numel())
    # Stable: equal logits keep the order of their ids on every device.
    scores, order = torch.sort(logits_V.float().cpu(), descending=True, stable=True)
    scores = scores[:num_kept].double()
    probabilities = torch.softmax((scores - scores[0]) / sampling.temperature, dim=-1)
    cumulative = probabilities.cumsum(-1)
    if sampling.top_p < 1:
        # The token that crosses top_p still belongs to the nucleus.
        num_kept = int(torch.searchsorted(cumulative, torch.tensor(sampling.top_p, dtype=torch.float64))) + 1
        cumulative = cumulative[:num_kept]
    target = uniform(sampling.seed, draw.position) * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, torch.tensor(target, dtype=torch.float64), right=True))
    return int(order[min(index, len(cumulative) - 1)])
