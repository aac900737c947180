"""The pod of three real processes continues prompts exactly as transformers does on the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from node.models.package import build_package
from node.models.reference import resolve
from node.models.tokenizer import ChatTokenizer
from tests.e2e.conftest import MODEL, LocalPod

pytestmark = pytest.mark.processes

NUM_TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "The three laws of motion say that",
    "1, 2, 3, 5, 8,",
)


@pytest.fixture(scope="module")
def floats(pod: LocalPod) -> Iterator[str]:
    """The same file once more, unpacked: packed weights are computed with in another order."""
    name = "smollm2-float32"
    pod.nodes[0].pod("model", "add", MODEL, "--dtype", "float32", "--split", "3", "--name", name)
    pod.wait_ready(1, name=name)
    yield name
    pod.nodes[0].pod("model", "rm", name)


def test_five_prompts_give_the_tokens_of_transformers(pod: LocalPod, packages: Path, floats: str) -> None:
    """Greedy, float32, 64 tokens. The reference dequantizes the same file by transformers' own means."""
    tokenizer = ChatTokenizer(build_package(MODEL, "auto", packages).directory)
    model = dequantized_by_transformers(resolve(MODEL).weights[0])
    prompts_ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as executor:
        answers = list(executor.map(lambda ids: _ask(pod, floats, ids), prompts_ids))
    for prompt_ids, answer in zip(prompts_ids, answers, strict=True):
        reference = model.generate(
            torch.tensor([prompt_ids]), do_sample=False, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS
        )
        assert answer == tokenizer.decode(reference[0, len(prompt_ids) :].tolist())


def _ask(pod: LocalPod, model: str, prompt_ids: list[int]) -> str:
    """All prompts are asked at once: what runs beside a request must not change it."""
    done = pod.client(1).completions.create(
        model=model,
        prompt=prompt_ids,
        temperature=0,
        max_tokens=NUM_TOKENS,
        extra_body={"min_tokens": NUM_TOKENS},
    )
    assert done.usage is not None
    assert done.usage.completion_tokens == NUM_TOKENS
    return done.choices[0].text


def dequantized_by_transformers(path: Path) -> PreTrainedModel:
    """What `from_pretrained(gguf_file=...)` does for this architecture, without needing accelerate."""
    with pytest.MonkeyPatch.context() as patch:
        # Config and tensors come from one reading of the file, which takes seconds.
        patch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    return model
