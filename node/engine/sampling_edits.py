"""What a session's sampling changes in its logits: bias and penalties, with the token counts those need.

Frequency and presence penalties look at output tokens, the repetition penalty at the prompt too, as in vLLM
and the OpenAI API. Counts grow by one entry per token and are never recounted; their memory is bounded by the
distinct tokens of the session. Knows one session's ids; no frames and no random numbers.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from node.links.frames import Sampling

Scores = NDArray[np.float32]


class LogitEdits:
    """`add` each token of the output once it is settled; `apply` changes a row for the next pick."""

    def __init__(
        self, sampling: Sampling, prompt_ids: Sequence[int] = (), num_output_tokens_before: int = 0
    ) -> None:
        """`prompt_ids` as in the session's opening: its last `num_output_tokens_before` are output."""
        self._sampling = sampling
        self._bias_ids = np.array([token_id for token_id, _ in sampling.logit_bias], dtype=np.int64)
        self._biases = np.array([bias for _, bias in sampling.logit_bias], dtype=np.float32)
        ids = np.asarray(prompt_ids, dtype=np.int64)
        num_own = len(ids) - min(len(ids), num_output_tokens_before)
        # Ids under the repetition penalty: the prompt's, sorted, then those of the output that it has not.
        self._repeats = sampling.repetition_penalty != 1
        self._prompt_ids = np.unique(ids[:num_own]) if self._repeats else ids[:0]
        self._new_ids = array("q")
        self._slots: dict[int, int] = {}
        self._output_ids = array("q")
        self._counts = array("f")
        for token_id in ids[num_own:].tolist():
            self.add(token_id)

    @staticmethod
    def are_needed(sampling: Sampling) -> bool:
        return bool(sampling.logit_bias) or sampling.has_penalties

    def add(self, token_id: int) -> None:
        """One more token of the output. Constant time, but for the search among the prompt's."""
        if not self._sampling.has_penalties:
            return
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot < len(self._output_ids):
            self._counts[slot] += 1
            return
        self._output_ids.append(token_id)
        self._counts.append(1)
        if self._repeats and not self._is_in_prompt(token_id):
            self._new_ids.append(token_id)

    def apply(self, scores_V: Scores, extra_ids: Sequence[int] = ()) -> None:
        """Change the row: bias is added, then come the penalties, with `extra_ids` counted as output too."""
        scores_V[self._bias_ids] += self._biases
        if self._repeats:
            self._penalize_repetition(scores_V, extra_ids)
        if self._sampling.has_penalties:
            self._penalize_counts(scores_V, extra_ids)

    def _penalize_repetition(self, scores_V: Scores, extra_ids: Sequence[int]) -> None:
        """Positive logits are divided, others multiplied, once per distinct token (as in transformers)."""
        new = [i for i in set(extra_ids) if i not in self._slots and not self._is_in_prompt(i)]
        parts = [self._prompt_ids, np.frombuffer(self._new_ids, np.int64), np.array(new, dtype=np.int64)]
        ids = np.concatenate(parts)
        penalty = np.float32(self._sampling.repetition_penalty)
        seen = scores_V[ids]
        scores_V[ids] = np.where(seen > 0, seen / penalty, seen * penalty)

    def _penalize_counts(self, scores_V: Scores, extra_ids: Sequence[int]) -> None:
        ids = np.frombuffer(self._output_ids, np.int64)
        counts = np.frombuffer(self._counts, np.float32)
        if extra_ids:
            new = [i for i in dict.fromkeys(extra_ids) if i not in self._slots]
            new_slots = {token_id: slot for slot, token_id in enumerate(new, len(ids))}
            ids = np.concatenate([ids, np.array(new, dtype=np.int64)])
            counts = np.concatenate([counts, np.zeros(len(new), np.float32)])
            for i in extra_ids:
                counts[new_slots[i] if i in new_slots else self._slots[i]] += 1
        frequency = np.float32(self._sampling.frequency_penalty)
        scores_V[ids] -= counts * frequency + np.float32(self._sampling.presence_penalty)

    def _is_in_prompt(self, token_id: int) -> bool:
        at = int(self._prompt_ids.searchsorted(token_id))
        return at < len(self._prompt_ids) and int(self._prompt_ids[at]) == token_id
