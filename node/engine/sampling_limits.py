"""What a last stage accepts as sampling: values that make sense, and ids of its vocabulary. Pure."""

from __future__ import annotations

from node.links.frames import MAX_NUM_LOGIT_BIASES, MAX_NUM_TOP_LOGPROBS, Sampling

MAX_TEMPERATURE = 100.0
MAX_PENALTY = 100.0
MIN_REPETITION_PENALTY = 0.01
MAX_LOGIT_BIAS = 100.0


def sampling_problem(sampling: Sampling, vocab_size: int) -> str | None:
    """Why this cannot be, in a few words. Comparisons are such that NaN fails them."""
    biases = sampling.logit_bias
    checks = {
        "temperature": 0 <= sampling.temperature <= MAX_TEMPERATURE,
        "top_p": 0 < sampling.top_p <= 1,
        "min_p": 0 <= sampling.min_p <= 1,
        "frequency_penalty": abs(sampling.frequency_penalty) <= MAX_PENALTY,
        "presence_penalty": abs(sampling.presence_penalty) <= MAX_PENALTY,
        "repetition_penalty": MIN_REPETITION_PENALTY <= sampling.repetition_penalty <= MAX_PENALTY,
        "num_top_logprobs": -1 <= sampling.num_top_logprobs <= MAX_NUM_TOP_LOGPROBS,
        "logit_bias": len(biases) <= MAX_NUM_LOGIT_BIASES
        and all(abs(bias) <= MAX_LOGIT_BIAS for _, bias in biases)
        and len(dict(biases)) == len(biases),
    }
    for name, is_fine in checks.items():
        if not is_fine:
            return f"{name} is outside its range"
    ids = [*sampling.eos_token_ids, *(token_id for token_id, _ in biases)]
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        return f"a token id is outside the vocabulary of {vocab_size}"
    return None
