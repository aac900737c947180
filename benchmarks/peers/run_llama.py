"""llama.cpp by its batch API (llama_decode), greedy sampling in its own C++: what its own benchmark tools do.

Run with the Python of `.bench/llama`: run_llama.py MODEL.gguf NUM_THREADS [RPC_SERVER ...]. With servers the
layers lie there, this process keeps the embedding and the sampling. One context per number of streams.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

import llama_cpp.llama_cpp as llama
from serve_lines import Operation, serve, timeline

MAX_NUM_CONTEXT_TOKENS = 4608
SHORT_CONTEXT_TOKENS = 512
BATCH_TOKENS = 2048


class Llama:
    def __init__(self, path: str, num_threads: int, rpc_servers: list[str]) -> None:
        self._num_threads = num_threads
        llama.llama_log_set(_quiet, ctypes.c_void_p(0))
        llama.llama_backend_init()
        for server in rpc_servers:
            _add_rpc_server(server)
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 99 if rpc_servers else 0
        model = llama.llama_model_load_from_file(path.encode(), params)
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._model = model
        self._contexts: dict[int, tuple[object, int]] = {}
        self._batch = llama.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._sampler = llama.llama_sampler_init_greedy()

    def operations(self) -> dict[str, Operation]:
        return {"decode": self.decode}

    def decode(self, prompts: list[list[int]], num_tokens: int) -> dict[str, float]:
        num_streams = len(prompts)
        context, capacity = self._context(num_streams, len(prompts[0]) + num_tokens)
        if len(prompts[0]) + num_tokens > capacity:
            raise ValueError(f"{len(prompts[0]) + num_tokens} tokens do not fit into {capacity}")
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        start_s = time.perf_counter()
        last = self._prefill(context, prompts)
        times = [[time.perf_counter()] for _ in prompts]
        for number in range(1, num_tokens):
            batch = self._batch
            batch.n_tokens = num_streams
            for stream in range(num_streams):
                self._put(stream, last[stream], len(prompts[stream]) + number - 1, stream, True)
            self._decode(context)
            last = [
                llama.llama_sampler_sample(self._sampler, context, stream) for stream in range(num_streams)
            ]
            now_s = time.perf_counter()
            for stream_times in times:
                stream_times.append(now_s)
        return timeline(start_s, times)

    def _prefill(self, context: object, prompts: list[list[int]]) -> list[int]:
        """All prompts in as few batches as they fit into; the first token of each."""
        last = [0] * len(prompts)
        rows = [(stream, position) for stream, ids in enumerate(prompts) for position in range(len(ids))]
        for begin in range(0, len(rows), BATCH_TOKENS):
            part = rows[begin : begin + BATCH_TOKENS]
            ends = []
            self._batch.n_tokens = len(part)
            for row, (stream, position) in enumerate(part):
                is_last = position == len(prompts[stream]) - 1
                self._put(row, prompts[stream][position], position, stream, is_last)
                if is_last:
                    ends.append((row, stream))
            self._decode(context)
            for row, stream in ends:
                last[stream] = llama.llama_sampler_sample(self._sampler, context, row)
        return last

    def _put(self, row: int, token: int, position: int, stream: int, wants_logits: bool) -> None:
        batch = self._batch
        batch.token[row] = token
        batch.pos[row] = position
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = stream
        batch.logits[row] = wants_logits

    def _decode(self, context: object) -> None:
        code = llama.llama_decode(context, self._batch)
        if code:
            raise RuntimeError(f"llama_decode failed with {code}")

    def _context(self, num_streams: int, num_tokens: int) -> tuple[object, int]:
        """A stream's KV cache is its own (its default), long enough for what is asked."""
        found = self._contexts.get(num_streams)
        if found is not None and found[1] >= num_tokens:
            return found
        capacity = SHORT_CONTEXT_TOKENS if num_tokens <= SHORT_CONTEXT_TOKENS else MAX_NUM_CONTEXT_TOKENS
        params = llama.llama_context_default_params()
        params.n_ctx = capacity * num_streams
        params.n_seq_max = num_streams
        params.n_batch = BATCH_TOKENS
        params.n_threads = params.n_threads_batch = self._num_threads
        if found is not None:
            llama.llama_free(found[0])
        context = llama.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._contexts[num_streams] = (context, capacity)
        return self._contexts[num_streams]


def _add_rpc_server(address: str) -> None:
    """What its `--rpc` option does; the Python bindings have no name for it."""
    directory = Path(os.environ["LLAMA_CPP_LIB_PATH"])
    rpc = ctypes.CDLL(str(directory / "libggml-rpc.so"))
    ggml = ctypes.CDLL(str(directory / "libggml.so"))
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    ggml.ggml_backend_register.argtypes = [ctypes.c_void_p]
    registered = rpc.ggml_backend_rpc_add_server(address.encode())
    if not registered:
        raise RuntimeError(f"no RPC server at {address}")
    ggml.ggml_backend_register(registered)


@llama.llama_log_callback
def _quiet(level: int, text: bytes, _: object) -> None:
    if level >= 4:
        sys.stderr.write(text.decode(errors="replace"))


if __name__ == "__main__":
    serve(lambda: Llama(sys.argv[1], int(sys.argv[2]), sys.argv[3:]).operations())
