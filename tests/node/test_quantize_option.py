"""`pod model add --quantize`: which combinations there are."""

from __future__ import annotations

import pytest

from node.cli.models import chosen_dtype
from node.errors import UserError


@pytest.mark.parametrize(
    ("dtype", "quantize", "chosen"),
    [
        ("auto", None, "auto"),
        ("float32", None, "float32"),
        ("auto", "int4", "int4"),
        ("int8", "int8", "int8"),
    ],
)
def test_quantize_is_a_dtype(dtype: str, quantize: str | None, chosen: str) -> None:
    assert chosen_dtype(dtype, quantize) == chosen


@pytest.mark.parametrize(
    ("dtype", "quantize", "line"),
    [
        ("auto", "int3", r"--quantize must be one of int4, int8 \(got 'int3'\)"),
        ("float32", "int4", "--quantize int4 and --dtype float32 exclude each other"),
    ],
)
def test_what_makes_no_sense_is_refused(dtype: str, quantize: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        chosen_dtype(dtype, quantize)
