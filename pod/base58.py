"""Base58 as libp2p and Bitcoin write it: text to double-click and copy, without look-alike characters."""

from __future__ import annotations

ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_VALUES = {character: value for value, character in enumerate(ALPHABET)}


def encode(raw: bytes) -> str:
    number = int.from_bytes(raw, "big")
    digits: list[str] = []
    while number:
        number, digit = divmod(number, 58)
        digits.append(ALPHABET[digit])
    num_zeros = len(raw) - len(raw.lstrip(b"\0"))
    return ALPHABET[0] * num_zeros + "".join(reversed(digits))


def decode(text: str, max_num_characters: int = 16_384) -> bytes:
    """Raises ValueError for other characters or for text longer than the limit (the cost is quadratic)."""
    if len(text) > max_num_characters:
        raise ValueError("too long")
    number = 0
    for character in text:
        if character not in _VALUES:
            raise ValueError(f"{character!r} is not a base58 character")
        number = number * 58 + _VALUES[character]
    num_zeros = len(text) - len(text.lstrip(ALPHABET[0]))
    return b"\0" * num_zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")
