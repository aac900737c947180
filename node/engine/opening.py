"""Whether a stage can take a session: every field is checked here before anything is reserved."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from node.engine.loaded import LoadedShard
from node.engine.prefix_hashes import BLOCK_TOKENS, prefix_hashes
from node.engine.sampling_limits import sampling_problem
from node.engine.session import max_num_tokens
from node.links.frames import ErrorCode, OpenSession
from node.models.manifest import Manifest


class Refusal(Exception):
    """`code` and one line for people."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class NoRoom(Refusal):
    """Nothing is wrong but that others are there, or come first: what may yet come in."""


def find_shard(opening: OpenSession, node: bytes, peer: bytes, shards: Iterable[LoadedShard]) -> LoadedShard:
    """The shard that runs this stage. Raises Refusal."""
    route, index = opening.route, opening.stage_index
    if opening.head != peer:
        raise Refusal(ErrorCode.BAD_FRAME, "a session is opened by its head")
    if not 0 <= index < len(route) or route[index].node != node:
        raise Refusal(ErrorCode.BAD_FRAME, "this node is not that stage of the route")
    if len({stage.node for stage in route}) < len(route):
        raise Refusal(ErrorCode.BAD_FRAME, "a route visits a node once")
    stage = route[index]
    for loaded in shards:
        if loaded.covers(opening.model, stage.start_layer, stage.end_layer):
            _check_route(opening, loaded.manifest.num_layers)
            _check_request(opening, loaded.manifest)
            return loaded
    layers = f"[{stage.start_layer},{stage.end_layer})"
    raise Refusal(ErrorCode.UNKNOWN_SHARD, f"layers {layers} of that model are not loaded here")


def _check_route(opening: OpenSession, num_layers: int) -> None:
    expected = 0
    for stage in opening.route:
        if stage.start_layer != expected or stage.end_layer <= expected:
            raise Refusal(ErrorCode.BAD_FRAME, "the route's layer ranges do not join")
        expected = stage.end_layer
    if expected != num_layers:
        raise Refusal(ErrorCode.BAD_FRAME, f"the route covers {expected} of {num_layers} layers")


def _check_request(opening: OpenSession, manifest: Manifest) -> None:
    sampling, num_before = opening.sampling, opening.num_output_tokens_before
    if opening.num_prompt_tokens < 1 or not 0 <= num_before < opening.num_prompt_tokens:
        raise Refusal(ErrorCode.BAD_FRAME, "a session needs a prompt")
    if sampling.max_num_output_tokens <= num_before:
        raise Refusal(ErrorCode.BAD_FRAME, "a session needs at least one output token")
    if max_num_tokens(opening) > manifest.max_context_tokens:
        raise Refusal(
            ErrorCode.BAD_FRAME,
            f"{max_num_tokens(opening)} tokens do not fit the context of {manifest.max_context_tokens}",
        )
    problem = sampling_problem(sampling, manifest.vocab_size)
    if problem is not None:
        raise Refusal(ErrorCode.BAD_FRAME, problem)
    _check_prompt(opening)
    ids = opening.prompt_ids
    if ids and not 0 <= min(ids) <= max(ids) < manifest.vocab_size:
        raise Refusal(ErrorCode.BAD_FRAME, f"a token id is outside the vocabulary of {manifest.vocab_size}")


def _check_prompt(opening: OpenSession) -> None:
    """The first stage has the ids, and with them can tell whether the hashes are theirs."""
    num_ids, index = len(opening.prompt_ids), opening.stage_index
    is_last = index == len(opening.route) - 1
    needs_it = is_last and opening.sampling.needs_prompt(opening.num_output_tokens_before)
    may_be_without = index > 0 and not needs_it
    may_be_given = index == 0 or is_last
    if not (num_ids == 0 and may_be_without) and not (num_ids == opening.num_prompt_tokens and may_be_given):
        message = "the first stage, and the last for penalties, and no other, is given the whole prompt"
        raise Refusal(ErrorCode.BAD_FRAME, message)
    if not opening.prefix_hashes:
        return
    if len(opening.prefix_hashes) > opening.num_prompt_tokens // BLOCK_TOKENS:
        raise Refusal(ErrorCode.BAD_FRAME, "there are more prefix hashes than full blocks of the prompt")
    if index == 0:
        ids = packed_ids(opening.prompt_ids)[: len(opening.prefix_hashes) * BLOCK_TOKENS]
        if opening.prefix_hashes != prefix_hashes(opening.model, opening.head, ids):
            raise Refusal(ErrorCode.BAD_FRAME, "the prefix hashes are not those of the prompt")


def packed_ids(prompt_ids: Sequence[int]) -> array[int]:
    """A copy, four bytes each: what the ids came in belongs to the link."""
    return array("I", bytes(prompt_ids) if isinstance(prompt_ids, memoryview) else prompt_ids)
