"""Tokens per second of a pod, whole and split over three processes, beside transformers in the same run.

Everything through what a user has: real node processes and the OpenAI API. All use as many threads as there
are cores; the split pod's processes have one each. Covers decoding only, on loopback.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI

from node.local_pod import LocalNode

MODEL = "smollm2-135m"
PROMPT = "The history of the city of Paris begins"
NUM_TOKENS = 48
NUM_RUNS = 3
STREAMS = (1, 4, 16)
READY_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Row:
    """`tokens_per_s` by number of streams: median, least and most over the runs."""

    name: str
    tokens_per_s: dict[int, tuple[float, float, float]]


def spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def start_pod(directory: Path, num_nodes: int) -> list[LocalNode]:
    nodes = [LocalNode(f"node{n}", directory / f"node{n}") for n in range(num_nodes)]
    for node in nodes:
        node.home.mkdir()
    nodes[0].pod("create", "benchmark", "--member", nodes[0].member)
    nodes[0].start("up")
    nodes[0].wait_until_up()
    for node in nodes[1:]:
        node.start("join", nodes[0].pod("invite")["invite"], "--member", node.member)
        node.wait_until_up()
    nodes[0].pod("model", "add", MODEL, "--split", str(num_nodes))
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        models = nodes[0].pod("status")["models"]
        if models and models[0]["state"] == "ready" and models[0]["num_stages"] == num_nodes:
            return nodes
        time.sleep(0.3)
    raise TimeoutError(f"{MODEL} was not ready over {num_nodes} nodes in time")


def measure_pod(name: str, num_nodes: int) -> Row:
    with tempfile.TemporaryDirectory() as directory:
        # One node gets every core, several get one each.
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_nodes))
        nodes = start_pod(Path(directory), num_nodes)
        try:
            key = nodes[0].pod("key", "create")["key"]
            client = OpenAI(base_url=f"{nodes[0].api_url}/v1", api_key=key, timeout=600)
            measured: dict[int, tuple[float, float, float]] = {}
            for num_streams in STREAMS:
                streams_once(client, num_streams)
                measured[num_streams] = spread([streams_once(client, num_streams) for _ in range(NUM_RUNS)])
        finally:
            for node in nodes:
                node.stop()
        shutil.rmtree(directory, ignore_errors=True)
    return Row(name, measured)


def streams_once(client: OpenAI, num_streams: int) -> float:
    """Tokens per second over all streams, from the first request to the last answer."""

    def ask() -> None:
        client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=NUM_TOKENS, temperature=0, extra_body={"ignore_eos": True}
        )

    threads = [threading.Thread(target=ask) for _ in range(num_streams)]
    began_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return num_streams * NUM_TOKENS / (time.perf_counter() - began_s)


def measure_transformers() -> Row:
    """`generate` in this process, float32, the same dequantized weights, batched for several streams."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from node.models.package import build_package
    from node.models.reference import resolve
    from node.models.tokenizer import ChatTokenizer

    torch.set_num_threads(os.cpu_count() or 1)
    path = resolve(MODEL).weights[0]
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    with tempfile.TemporaryDirectory() as directory:
        package = build_package(MODEL, "auto", Path(directory))
        prompt_ids = ChatTokenizer(package.directory).encode(PROMPT)

    def generate(num_streams: int) -> float:
        ids = torch.tensor([prompt_ids] * num_streams)
        began_s = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=NUM_TOKENS,
            max_new_tokens=NUM_TOKENS,
            pad_token_id=0,
        )
        return num_streams * NUM_TOKENS / (time.perf_counter() - began_s)

    return Row("transformers generate", {n: spread([generate(n) for _ in range(NUM_RUNS)]) for n in STREAMS})


def table(rows: list[Row], peer: Row) -> str:
    lines = [
        "| tokens/s, median (least to most) of "
        + str(NUM_RUNS)
        + " | "
        + " | ".join(f"{n} streams" for n in STREAMS)
        + " |",
        "|---|" + "---|" * len(STREAMS),
    ]
    for row in (peer, *rows):
        cells = [
            f"{row.tokens_per_s[n][0]:.1f} ({row.tokens_per_s[n][1]:.1f} to {row.tokens_per_s[n][2]:.1f})"
            + ("" if row is peer else f", {row.tokens_per_s[n][0] / peer.tokens_per_s[n][0]:.2f} of the peer")
            for n in STREAMS
        ]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    peer = measure_transformers()
    print(table([measure_pod("pod, whole", 1), measure_pod("pod, split over 3", 3)], peer))


if __name__ == "__main__":
    main()
