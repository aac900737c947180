"""Log-probabilities of tokens, for the client: over the model's own logits at temperature 1, whatever bias,
penalties and cuts the pick was made with (as the OpenAI API and vLLM's `raw_logprobs` report). Knows one row.
"""

from __future__ import annotations

import math

from node.engine.sampling_cut import NUM_WEIGHT_BITS, Scores, Scratch, likeliest, weights


def logprobs(
    raw_V: Scores, token_id: int, num_top: int, scratch: Scratch
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The token's own, and (id, logprob) of the `num_top` likeliest, likeliest first.

    Tokens of probability 0 (a logit of -inf) are not listed; the picked one is never among them.
    """
    listed = likeliest(raw_V, min(max(num_top, 1), len(raw_V)), scratch)
    top = float(raw_V[listed[0]])
    total = int(weights(raw_V, top, 1.0, scratch).sum())
    log_total = top + math.log(total) - NUM_WEIGHT_BITS * math.log(2)
    pairs = ((int(one), float(raw_V[one]) - log_total) for one in listed[:num_top])
    return float(raw_V[token_id]) - log_total, tuple(pair for pair in pairs if math.isfinite(pair[1]))
