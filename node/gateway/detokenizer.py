"""Token ids to text, as they come: only whole characters leave, and what has left never changes.

A window of ids is decoded again with each new one: the ids of the last finished piece (some tokenizers
treat the first token of a text specially) and those since. A character whose bytes are not all there decodes
to U+FFFD at the end of the window, so trailing U+FFFD is held back until more ids settle it; what is still
incomplete at the end of the generation is no text and is dropped. After Hugging Face TGI and vLLM.
"""

from __future__ import annotations

from node.gateway.backend import TextTokenizer

REPLACEMENT = "\ufffd"
# Seven byte tokens hold one character and the start of the next; a longer run is not UTF-8 and never will be.
MAX_NUM_REPLACEMENTS_HELD = 8
MAX_NUM_WINDOW_TOKENS = 256


class Detokenizer:
    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._settled_ids: list[int] = []
        self._window_ids: list[int] = []
        self._num_settled_chars = 0
        self._num_emitted_chars = 0

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; often a word, sometimes nothing."""
        self._window_ids.append(token_id)
        text = self._tokenizer.decode([*self._settled_ids, *self._window_ids])[self._num_settled_chars :]
        whole = text.rstrip(REPLACEMENT)
        num_held = len(text) - len(whole)
        if num_held > MAX_NUM_REPLACEMENTS_HELD or len(self._window_ids) > MAX_NUM_WINDOW_TOKENS:
            whole, num_held = text, 0
        new = whole[self._num_emitted_chars :]
        self._num_emitted_chars = max(self._num_emitted_chars, len(whole))
        if whole and not num_held:
            self._settle_window()
        elif len(self._window_ids) > MAX_NUM_WINDOW_TOKENS:
            self._window_ids = []
        return new

    def _settle_window(self) -> None:
        self._settled_ids = self._window_ids
        self._num_settled_chars = len(self._tokenizer.decode(self._settled_ids))
        self._window_ids = []
        self._num_emitted_chars = 0
