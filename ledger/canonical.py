"""Canonical CBOR of integers, bytes, maps with small integer keys, and lists: every record has one encoding.

It knows nothing of what the records mean. Hostile bytes are bounded before they are parsed, no CBOR tag is
ever interpreted, and what was read is encoded again and compared with the bytes it was given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Union, cast

import cbor2

MAX_UINT = 2**63 - 1
_MAX_DEPTH = 6
_NESTED = (dict, list)

Value = Union[int, bytes, "list[Value]", "dict[int, Value]"]


class CanonicalError(ValueError):
    """The bytes are not a record in canonical form."""


def _refuse(*_: object) -> object:
    raise CanonicalError("tags are not allowed")


# cbor2 builds dates, decimals, shared references and more from these tags; none of them is in our format.
_BUILT_IN_TAGS = (0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 100, 256, 258, 260, 261, 1004, 43000, 55799)
_REFUSALS = dict.fromkeys(_BUILT_IN_TAGS, _refuse)


def encode(fields: Sequence[Value] | Mapping[int, Value]) -> bytes:
    """Encode a record; a sequence becomes a map keyed 0, 1, 2, ... (ascending keys are canonical order)."""
    mapping = fields if isinstance(fields, Mapping) else dict(enumerate(fields))
    return cbor2.dumps(mapping)


def decode(raw: bytes, max_num_bytes: int, *, was_checked: bool = False) -> FieldReader:
    """Parse one map; raise CanonicalError unless its own encoding, with the keys 0, 1, 2, ..., is `raw`.

    `was_checked`: these very bytes were compared before.
    """
    if len(raw) > max_num_bytes:
        raise CanonicalError(f"{len(raw)} bytes, at most {max_num_bytes} are allowed")
    try:
        value = cast(
            Value,
            cbor2.loads(
                raw,
                max_depth=_MAX_DEPTH,
                allow_indefinite=False,
                allow_duplicate_keys=False,
                semantic_decoders=_REFUSALS,
                tag_hook=_refuse,
            ),
        )
        is_canonical = was_checked or cbor2.dumps(_as_we_write(value)) == raw
    except (cbor2.CBORError, ValueError, TypeError, OverflowError) as error:
        raise CanonicalError(f"not canonical CBOR: {error}") from error
    if not is_canonical:
        raise CanonicalError("not in canonical form")
    return FieldReader(value, was_checked)


def _as_we_write(value: Value) -> Value:
    """The same with the keys every map of ours has. What is no integer or bytes, FieldReader refuses."""
    if type(value) is dict:
        items = enumerate(value.values())
        return {key: _as_we_write(item) if type(item) in _NESTED else item for key, item in items}
    if type(value) is list:
        return [_as_we_write(item) if type(item) in _NESTED else item for item in value]
    return value


def fields(*values: Value) -> dict[int, Value]:
    """A nested record, keyed 0, 1, 2, ..."""
    return dict(enumerate(values))


class FieldReader:
    """Typed access to the fields of a decoded map; a wrong type, size or number of fields is an error."""

    def __init__(self, value: Value, was_checked: bool = False) -> None:
        """`was_checked`: as the map it is from, and so is every record inside it."""
        if type(value) is not dict:
            raise CanonicalError("a map is expected")
        self._fields = value
        self.was_checked = was_checked

    def expect_num_fields(self, num_fields: int) -> None:
        if len(self._fields) != num_fields:
            raise CanonicalError(f"{len(self._fields)} fields, {num_fields} are expected")

    def uint(self, key: int, maximum: int = MAX_UINT) -> int:
        value = self._fields.get(key)
        if type(value) is not int or not 0 <= value <= maximum:
            raise CanonicalError(f"field {key} is not an integer from 0 to {maximum}")
        return value

    def raw(self, key: int, num_bytes: int) -> bytes:
        value = self._fields.get(key)
        if type(value) is not bytes or len(value) != num_bytes:
            raise CanonicalError(f"field {key} is not {num_bytes} bytes")
        return value

    def raw_up_to(self, key: int, max_num_bytes: int) -> bytes:
        value = self._fields.get(key)
        if type(value) is not bytes or len(value) > max_num_bytes:
            raise CanonicalError(f"field {key} is not at most {max_num_bytes} bytes")
        return value

    def reader(self, key: int) -> FieldReader:
        return FieldReader(self._fields.get(key, 0), self.was_checked)

    def raws(self, key: int, max_num_items: int, max_num_bytes: int) -> tuple[bytes, ...]:
        value = self._fields.get(key)
        if type(value) is not list or len(value) > max_num_items:
            raise CanonicalError(f"field {key} is not a list of at most {max_num_items}")
        found: list[bytes] = []
        for item in value:
            if type(item) is not bytes or len(item) > max_num_bytes:
                raise CanonicalError(f"field {key} holds an item that is not at most {max_num_bytes} bytes")
            found.append(item)
        return tuple(found)
