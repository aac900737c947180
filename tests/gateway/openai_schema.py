"""Validating answers against OpenAI's own document. OpenAPI's `nullable` and `const`-less enums are told to
JSON Schema first; one schema is stricter than the original service and is corrected, with the reason."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

DOCUMENT = Path(__file__).with_name("openai-openapi.json")


def check(name: str, value: object) -> None:
    """Assert that `value` is a valid `components.schemas[name]`."""
    errors = sorted(_validator(name).iter_errors(value), key=lambda error: list(map(str, error.path)))
    assert not errors, f"{name}: {errors[0].message} at {list(errors[0].path)}"


@cache
def _validator(name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", **_document()})


@cache
def _document() -> dict[str, Any]:
    document: dict[str, Any] = {"components": json.loads(DOCUMENT.read_text())["components"]}
    choice = document["components"]["schemas"]["CreateCompletionResponse"]["properties"]["choices"]["items"]
    # The document has one schema for whole answers and chunks; the service sends null until the last chunk.
    choice["properties"]["finish_reason"]["nullable"] = True
    return _with_null(document)


def _with_null(node: Any) -> Any:
    """OpenAPI 3.0's `nullable: true` as `anyOf: […, null]`."""
    if isinstance(node, list):
        return [_with_null(item) for item in node]
    if not isinstance(node, dict):
        return node
    plain = {key: _with_null(item) for key, item in node.items() if key != "nullable"}
    return {"anyOf": [plain, {"type": "null"}]} if node.get("nullable") is True else plain
