"""Which guesses come true: exactly those that one row at a time would have given, whatever was guessed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from hypothesis import given
from hypothesis import strategies as st

from node.engine.group import Group
from node.engine.outbox import Outbox
from node.engine.outputs import Outputs
from node.engine.session import Slice, StageSession
from node.engine.speculation import PassCosts, Speculation
from node.links.frames import FinishReason, Sampling, TokenItem

VOCAB = 6
PROMPT_TOKENS = 10
EOS = 5
IDS = st.integers(0, VOCAB - 1)


class Told(Outbox):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.items: list[TokenItem] = []
        self.first_stages: list[bytes | None] = []

    def add_token(self, head: bytes, first_stage: bytes | None, item: TokenItem) -> None:
        self.items.append(item)
        self.first_stages.append(first_stage)


def session_of(number: int, max_num_output_tokens: int) -> StageSession:
    sampling = Sampling(temperature=0, max_num_output_tokens=max_num_output_tokens, eos_token_ids=(EOS,))
    opening = SimpleNamespace(sampling=sampling, num_prompt_tokens=PROMPT_TOKENS, num_output_tokens_before=0)
    fields: dict[str, Any] = {
        "id": bytes([number]) * 16,
        "head": b"h",
        "next_node": b"n",
        "opening": opening,
        "num_prompt_tokens": PROMPT_TOKENS,
        "num_own_prompt_tokens": PROMPT_TOKENS,
        "edits": None,
        "is_first_stage": False,
        "is_finished": False,
    }
    return cast(StageSession, SimpleNamespace(**fields))


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[tuple[int, ...], list[int], int, int]]:
    """Per session: guesses, what each row says, how much output there was, how much there may be."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        drafts = tuple(draw(st.lists(IDS, max_size=15)))
        likely = [st.sampled_from([draft, draft, draft, (draft + 1) % VOCAB]) for draft in (*drafts, 0)]
        said = [draw(ids) for ids in likely]
        before = draw(st.integers(0, 5))
        found.append((drafts, said, before, before + 1 + draw(st.integers(0, 20))))
    return found


@given(steps())
def test_tokens_are_those_of_one_row_at_a_time(
    sessions: list[tuple[tuple[int, ...], list[int], int, int]],
) -> None:
    logits, parts, expected = [], [], []
    for number, (drafts, said, before, most) in enumerate(sessions):
        session = session_of(number, most)
        position = PROMPT_TOKENS + before - 1
        parts.append(Slice(session, position, 1 + len(drafts), (), 0, 0.0, drafts))
        logits += [[float(token == row) for token in range(VOCAB)] for row in said]
        for row, token in enumerate(said):
            num_output = before + row + 1
            reason = FinishReason.STOP if token == EOS else FinishReason.NONE
            if num_output >= most:
                reason = reason or FinishReason.LENGTH
            expected.append(TokenItem(session.id, position + 1 + row, token, reason))
            if reason or row == len(drafts) or drafts[row] != token:
                break
    outbox = Told()
    shard = SimpleNamespace(logits=lambda hidden: hidden)
    group = cast(Group, SimpleNamespace(is_last=True, loaded=SimpleNamespace(shard=shard)))
    assert Outputs(outbox, lambda *_: None).take(group, parts, torch.tensor(logits)) == []
    assert sorted(outbox.items, key=lambda item: (item.session, item.position)) == expected
    for item, first_stage in zip(outbox.items, outbox.first_stages, strict=True):
        is_finished = any(i.session == item.session and i.finish_reason for i in expected)
        assert first_stage == (None if is_finished else b"n")


@given(st.lists(IDS, min_size=2, max_size=200), st.integers(1, 15), st.floats(0.001, 2))
def test_what_is_guessed_fits_the_session_and_its_rates_are_what_came_true(
    text: list[int], max_num_drafts: int, price: float
) -> None:
    """A whole session with a ring that says `text`."""
    text = text * 2
    speculation = Speculation(text[:3], len(text), max_num_drafts)
    told, num_drafts, num_passes = 3, 0, 0
    came: list[int] = []
    while told < len(text):
        num_passes += 1
        num_accepted = 0
        while num_accepted < num_drafts and came[num_accepted] == text[told + num_accepted]:
            num_accepted += 1
        tokens = text[told : told + num_accepted + 1]
        told += len(tokens)
        speculation.tokens_came(tokens, num_drafts, 0.0)
        if told == len(text):
            break
        came = list(speculation.propose(PassCosts(1.0, price), 15))
        num_drafts = len(came)
        assert num_drafts <= max_num_drafts
        # The row of the last guess still has a token to give.
        assert told + num_drafts < len(text)
    assert told == len(text)
    assert num_passes <= len(text)
    assert all(0 <= odds.rate <= 1 for odds in speculation._odds.values())
