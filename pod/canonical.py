"""Canonical CBOR records: one byte string per value and one value per byte string. A frozen dataclass becomes
a map from field number to value; reading checks size, types and limits, then encodes again and compares.
Knows nothing of what the records mean. Fields may be int, str, bytes, IntEnum or tuples of those, with their
limits given by `Annotated`.
"""

from __future__ import annotations

import dataclasses
from enum import IntEnum
from typing import Annotated, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import cbor2

MAX_INT = 2**63 - 1
MAX_DEPTH = 8
# The library makes dates, patterns, big numbers and shared objects of these: time and memory for the asking.
_BUILT_IN_TAGS = (*range(6), *range(21, 40), 52, 54, 100, *range(256, 262), 1004, 43000, 55799)

Record = TypeVar("Record")
_FIELD_TYPES: dict[type[object], tuple[tuple[str, object], ...]] = {}


class DecodeError(ValueError):
    """Bytes that are not the canonical encoding of what was expected."""


@dataclasses.dataclass(frozen=True, slots=True)
class Length:
    """Least and most bytes, characters or items of a field."""

    least: int
    most: int


Id = Annotated[bytes, Length(32, 32)]
Signature = Annotated[bytes, Length(64, 64)]
Name = Annotated[str, Length(1, 64)]
Certificate = Annotated[bytes, Length(1, 2048)]


def encode(value: object) -> bytes:
    return cbor2.dumps(value, canonical=True)


def _refuse_tag(*_: object) -> NoReturn:
    raise DecodeError("a tag has no place here")


_NO_TAGS = dict.fromkeys(_BUILT_IN_TAGS, _refuse_tag)


def decode(raw: bytes, max_bytes: int) -> object:
    """Plain values only. Raises DecodeError unless `raw` is the one encoding of what it says."""
    if len(raw) > max_bytes:
        raise DecodeError(f"{len(raw)} bytes where at most {max_bytes} are allowed")
    try:
        value: object = cbor2.loads(
            raw,
            max_depth=MAX_DEPTH,
            allow_indefinite=False,
            semantic_decoders=_NO_TAGS,
            tag_hook=_refuse_tag,
        )
        canonical = encode(value)
    except (cbor2.CBORError, ValueError, TypeError, RecursionError, OverflowError, MemoryError) as error:
        raise DecodeError(f"not CBOR: {error}") from None
    if canonical != raw:
        raise DecodeError("not canonical CBOR")
    return value


def pack(record: object) -> dict[int, object]:
    """A frozen dataclass as a map from field number to plain value."""
    assert dataclasses.is_dataclass(record)
    return {number: getattr(record, field.name) for number, field in enumerate(dataclasses.fields(record))}


def unpack(kind: type[Record], value: object) -> Record:
    hints = _field_types(kind)
    if not isinstance(value, dict) or list(value) != list(range(len(hints))):
        raise DecodeError(f"wrong fields for {kind.__name__}")
    return kind(*(_checked(value[number], hint, name) for number, (name, hint) in enumerate(hints)))


def encode_record(record: object) -> bytes:
    return encode(pack(record))


def decode_record(kind: type[Record], raw: bytes, max_bytes: int) -> Record:
    record = unpack(kind, decode(raw, max_bytes))
    # True and 0.0 equal 1 and 0 as map keys: only writing the record again proves that this is its one form.
    if encode_record(record) != raw:
        raise DecodeError("not the canonical form")
    return record


def _field_types(kind: type[object]) -> tuple[tuple[str, object], ...]:
    if kind not in _FIELD_TYPES:
        assert dataclasses.is_dataclass(kind)
        hints = get_type_hints(kind, include_extras=True)
        _FIELD_TYPES[kind] = tuple((field.name, hints[field.name]) for field in dataclasses.fields(kind))
    return _FIELD_TYPES[kind]


def _checked(value: object, hint: object, name: str) -> object:
    """The value of one field, as its type; lists become tuples, numbers of an IntEnum its members."""
    if get_origin(hint) is Annotated:
        inner, length = get_args(hint)
        checked = _checked(value, inner, name)
        assert isinstance(length, Length)
        if not isinstance(checked, bytes | str | tuple) or not length.least <= len(checked) <= length.most:
            raise DecodeError(f"{name} has a wrong length")
        return checked
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise DecodeError(f"{name} is not a list")
        return tuple(_checked(item, get_args(hint)[0], name) for item in value)
    assert isinstance(hint, type)
    if issubclass(hint, IntEnum):
        return _member_of(hint, value, name)
    if type(value) is not hint:
        raise DecodeError(f"{name} has a wrong type")
    if isinstance(value, int) and not 0 <= value <= MAX_INT:
        raise DecodeError(f"{name} is out of range")
    if isinstance(value, str) and not value.isprintable():
        raise DecodeError(f"{name} has unprintable characters")
    return value


def _member_of(kind: type[IntEnum], value: object, name: str) -> IntEnum:
    if type(value) is not int or value not in kind._value2member_map_:
        raise DecodeError(f"{name} has an unknown value")
    return kind(value)
