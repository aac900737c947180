"""transformers `generate`, greedy, batched: run_transformers.py MODEL_DIR NUM_THREADS DTYPE.

MODEL_DIR is what `export.py` writes: the same weights, dequantized, as safetensors.
"""

from __future__ import annotations

import sys
import time

import torch
from serve_lines import Operation, serve, timeline
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer


class TokenClock(BaseStreamer):
    """The time of each step; the first call only hands over the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def load(directory: str, num_threads: int, dtype: str) -> dict[str, Operation]:
    torch.set_num_threads(num_threads)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), local_files_only=True
    )

    def decode(prompts: list[list[int]], num_tokens: int) -> dict[str, float]:
        ids = torch.tensor(prompts)
        clock = TokenClock()
        start_s = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            pad_token_id=0,
            streamer=clock,
        )
        return timeline(start_s, [clock.times[1:]] * len(prompts))

    return {"decode": decode}


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
