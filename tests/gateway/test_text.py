"""Detokenizing and stop strings, as properties: however text is cut into pieces, the result is the same."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st

from node.gateway.detokenizer import REPLACEMENT, Detokenizer
from node.gateway.stop_strings import StopStrings
from tests.gateway.fake_backend import EOS, ByteTokenizer

TEXTS = st.text(st.sampled_from("ab é你🌍") | st.characters(codec="utf-8"), max_size=30)


class SpacelessStart(ByteTokenizer):
    """Like SentencePiece: the first token of a text loses its leading space."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return super().decode(ids).removeprefix(" ")


class ByteFallback(ByteTokenizer):
    """Like Llama's: a run of byte tokens that is no UTF-8 as a whole is one U+FFFD for each byte."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        body = bytes(id_ for id_ in ids if id_ < EOS)
        try:
            return body.decode()
        except UnicodeDecodeError as error:
            # ASCII tokens are ordinary tokens here and end a run of bytes.
            start = max((at + 1 for at in range(error.start) if body[at] < 128), default=0)
            end = next((at for at in range(error.start, len(body)) if body[at] < 128), len(body))
            return body[:start].decode() + REPLACEMENT * (end - start) + self.decode(body[end:])


def stream(tokenizer: ByteTokenizer, ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(id_) for id_ in ids]


@given(TEXTS.filter(lambda text: REPLACEMENT not in text))
@example("🌍" * 40)
def test_whole_characters_only(text: str) -> None:
    for tokenizer in (ByteTokenizer(), ByteFallback()):
        pieces = stream(tokenizer, [*text.encode(), EOS])
        assert "".join(pieces) == text
        assert all(REPLACEMENT not in piece for piece in pieces)


@given(st.text("ab é", max_size=12))
@example("a b")
def test_a_space_inside_the_text_is_not_lost(text: str) -> None:
    tokenizer = SpacelessStart()
    assert "".join(stream(tokenizer, list(text.encode()))) == tokenizer.decode(list(text.encode()))


@given(st.lists(st.integers(0, EOS), max_size=60))
@example([0xF0] * 60)
def test_any_bytes_come_out_as_the_whole_would_but_for_an_unfinished_end(ids: list[int]) -> None:
    text = "".join(stream(ByteTokenizer(), ids))
    whole = ByteTokenizer().decode(ids)
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {REPLACEMENT}


def test_an_endless_run_of_rubbish_costs_a_bounded_window() -> None:
    longest = 0

    class Watched(ByteTokenizer):
        def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return super().decode(ids)

    stream(Watched(), [0xF0] * 3000)
    stream(Watched(), [EOS] * 3000)
    assert longest < 600


def run(stops: Sequence[str], pieces: Sequence[str]) -> tuple[list[str], bool]:
    matcher = StopStrings(stops)
    out = []
    for piece in pieces:
        out.append(matcher.push(piece))
        if matcher.found:
            return out, True
    return [*out, matcher.flush()], False


def by_characters(stops: Sequence[str], text: str) -> tuple[str, bool]:
    """The plain meaning: read by characters until some stop string ends here; the longest one goes."""
    for end in range(1, len(text) + 1):
        here = [stop for stop in stops if text[:end].endswith(stop)]
        if here:
            return text[: end - max(map(len, here))], True
    return text, False


SHORT = st.text("ab", min_size=1, max_size=4)


@given(st.lists(SHORT, min_size=1, max_size=4), st.lists(st.text("abc", max_size=5), max_size=12))
@example(["abc", "b"], ["a", "b", "c"])
@settings(max_examples=300)
def test_stop_strings_across_any_pieces(stops: list[str], pieces: list[str]) -> None:
    out, found = run(stops, pieces)
    assert ("".join(out), found) == by_characters(stops, "".join(pieces))


@given(st.lists(SHORT, min_size=1, max_size=4), st.lists(st.text("abc", max_size=5), max_size=12))
def test_only_a_possible_beginning_is_held_back(stops: list[str], pieces: list[str]) -> None:
    matcher = StopStrings(stops)
    sent = ""
    for at, piece in enumerate(pieces):
        sent += matcher.push(piece)
        if matcher.found:
            return
        held = "".join(pieces[: at + 1])[len(sent) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)
