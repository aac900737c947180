"""The header and payload of `OpenSession`, the one long frame: who asks for what, along which route.

The payload is the prefix hashes, one after the other, then the prompt ids (u32, little-endian), which are
read as a view. Knows no sockets and no sessions.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

from node.links import fields as f
from node.links.fields import FrameError
from node.links.frames import (
    MAX_AUTHORIZATION_BYTES,
    MAX_NUM_DRAFT_TOKENS,
    MAX_NUM_LOGIT_BIASES,
    MAX_NUM_TOP_LOGPROBS,
    MODEL_ID_BYTES,
    NODE_ID_BYTES,
    PREFIX_BLOCK_TOKENS,
    PREFIX_HASH_BYTES,
    OpenSession,
    Sampling,
    Stage,
)

Buffer = bytes | bytearray | memoryview

MAX_NUM_PROMPT_IDS = 1 << 20
MAX_NUM_PREFIX_HASHES = MAX_NUM_PROMPT_IDS // PREFIX_BLOCK_TOKENS
MAX_OPENING_PAYLOAD_BYTES = 4 * MAX_NUM_PROMPT_IDS + PREFIX_HASH_BYTES * MAX_NUM_PREFIX_HASHES
MAX_NUM_STAGES = 256
MAX_NUM_EOS_IDS = 256
MAX_NUM_ADDRESS_CHARS = 256
MAX_PENALTY = 100.0
MIN_REPETITION_PENALTY = 0.01
MAX_LOGIT_BIAS = 1000.0
_KEY_ID_BYTES = 16
_MEMBER_ID_BYTES = 32


def opening_header(frame: OpenSession) -> tuple[object, ...]:
    """Raises FrameError for sampling that no stage would take: the link would end instead of the session."""
    sampling = sampling_fields(frame.sampling)
    read_sampling(sampling)
    return (
        frame.session,
        frame.model,
        [(stage.node, stage.data_address, stage.start_layer, stage.end_layer) for stage in frame.route],
        frame.stage_index,
        frame.head,
        frame.payer,
        frame.key_id,
        frame.hold_microcredits,
        frame.num_prompt_tokens,
        sampling,
        frame.deadline_ms,
        frame.rate_card_version,
        frame.num_output_tokens_before,
        len(frame.prefix_hashes),
        frame.max_num_draft_tokens,
        frame.authorization,
    )


def sampling_fields(sampling: Sampling) -> tuple[object, ...]:
    return (
        float(sampling.temperature),
        float(sampling.top_p),
        sampling.top_k,
        sampling.seed,
        sampling.max_num_output_tokens,
        sampling.min_num_output_tokens,
        sampling.ignore_eos,
        sampling.eos_token_ids,
        float(sampling.min_p),
        float(sampling.frequency_penalty),
        float(sampling.presence_penalty),
        float(sampling.repetition_penalty),
        tuple((token_id, float(bias)) for token_id, bias in sampling.logit_bias),
        sampling.num_top_logprobs,
    )


def opening_payload(frame: OpenSession) -> bytes:
    hashes = b"".join(frame.prefix_hashes)
    assert len(hashes) == PREFIX_HASH_BYTES * len(frame.prefix_hashes)
    words = array("I", frame.prompt_ids)
    if sys.byteorder == "big":
        words.byteswap()
    return hashes + words.tobytes()


def read_opening(value: object, payload: Buffer) -> OpenSession:
    """Raises FrameError."""
    part = f.fields(value, 16)
    num_prompt_tokens = f.number(part[8], f.U32)
    max_num_hashes = min(num_prompt_tokens // PREFIX_BLOCK_TOKENS, MAX_NUM_PREFIX_HASHES)
    hashes, prompt_ids = _split(payload, f.number(part[13], max_num_hashes))
    return OpenSession(
        session=f.session(part[0]),
        model=f.blob(part[1], MODEL_ID_BYTES),
        route=tuple(map(_read_stage, f.many(part[2], MAX_NUM_STAGES))),
        stage_index=f.number(part[3], MAX_NUM_STAGES - 1),
        head=f.blob(part[4], NODE_ID_BYTES),
        payer=f.blob(part[5], _MEMBER_ID_BYTES),
        key_id=f.blob(part[6], _KEY_ID_BYTES),
        hold_microcredits=f.number(part[7], f.U63),
        num_prompt_tokens=num_prompt_tokens,
        sampling=read_sampling(part[9]),
        deadline_ms=f.number(part[10], f.U63),
        rate_card_version=f.number(part[11], f.U32),
        num_output_tokens_before=f.number(part[12], f.U32),
        prompt_ids=prompt_ids,
        prefix_hashes=hashes,
        max_num_draft_tokens=f.number(part[14], MAX_NUM_DRAFT_TOKENS),
        authorization=f.blob_up_to(part[15], MAX_AUTHORIZATION_BYTES),
    )


def read_sampling(value: object) -> Sampling:
    """Raises FrameError."""
    part = f.fields(value, 14)
    return Sampling(
        temperature=f.real(part[0]),
        top_p=f.real(part[1]),
        top_k=f.number(part[2], f.U32),
        seed=f.number(part[3], f.U64, -f.U63 - 1),
        max_num_output_tokens=f.number(part[4], f.U32),
        min_num_output_tokens=f.number(part[5], f.U32),
        ignore_eos=f.flag(part[6]),
        eos_token_ids=tuple(f.number(token_id, f.U32) for token_id in f.many(part[7], MAX_NUM_EOS_IDS)),
        min_p=f.real(part[8], 0.0, 1.0),
        frequency_penalty=f.real(part[9], -MAX_PENALTY, MAX_PENALTY),
        presence_penalty=f.real(part[10], -MAX_PENALTY, MAX_PENALTY),
        repetition_penalty=f.real(part[11], MIN_REPETITION_PENALTY, MAX_PENALTY),
        logit_bias=tuple(map(_read_bias, f.many(part[12], MAX_NUM_LOGIT_BIASES))),
        num_top_logprobs=f.number(part[13], MAX_NUM_TOP_LOGPROBS, -1),
    )


def _read_bias(value: object) -> tuple[int, float]:
    token_id, bias = f.fields(value, 2)
    return f.number(token_id, f.U32), f.real(bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)


def _read_stage(value: object) -> Stage:
    node, address, start_layer, end_layer = f.fields(value, 4)
    return Stage(
        f.blob(node, NODE_ID_BYTES),
        f.text(address, MAX_NUM_ADDRESS_CHARS),
        f.number(start_layer, f.U32),
        f.number(end_layer, f.U32),
    )


def _split(payload: Buffer, num_hashes: int) -> tuple[tuple[bytes, ...], Sequence[int]]:
    view = memoryview(payload).cast("B")
    end = PREFIX_HASH_BYTES * num_hashes
    if len(view) < end or (len(view) - end) % 4 or len(view) - end > 4 * MAX_NUM_PROMPT_IDS:
        raise FrameError("prefix hashes or prompt ids of the wrong length")
    hashes = tuple(bytes(view[at : at + PREFIX_HASH_BYTES]) for at in range(0, end, PREFIX_HASH_BYTES))
    return hashes, _u32_values(view[end:])


def _u32_values(view: memoryview) -> Sequence[int]:
    """A view: ten times smaller than Python's integers, and counted where the bytes are."""
    if sys.byteorder == "little":
        return view.cast("I")
    words = array("I", bytes(view))
    words.byteswap()
    return words
