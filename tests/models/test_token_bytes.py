"""Spelling single tokens: joined, their bytes are the text, in both kinds of vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from node.models.tokenizer import ChatTokenizer

TEXT = "Grüße, 世界 🙂\n\t\x00 \xa0ÿ"


def byte_level() -> Tokenizer:
    """Every byte, and one merge that ends within a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: index for index, piece in enumerate([*alphabet, "rÃ"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("r", "Ã")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_pieces() -> Tokenizer:
    """Words where there are words, bytes for the rest."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "G", "r", "ü"]
    tokenizer = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
def test_the_bytes_of_all_tokens_are_the_text(make: object, tmp_path: Path) -> None:
    assert callable(make)
    tokenizer = make()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(["a b"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = ChatTokenizer(tmp_path)
    ids = ours.encode(TEXT)
    spelled = [ours.token_bytes(token_id) for token_id in ids]
    assert b"".join(spelled).decode() == TEXT
    # Some alone are no characters: decoding them one by one would lose them.
    assert any(b"\xc3" in one and len(one) < 3 for one in spelled) or b"\xe4" in spelled
    end, added = (ours.encode(text)[0] for text in ("<|end|>", "a b"))
    assert (ours.token_bytes(end), ours.token_bytes(added)) == (b"<|end|>", b"a b")
    assert ours.token_bytes(10**6) == b""
