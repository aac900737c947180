"""Text <-> token ids and the chat template, from a package's bundle. Knows no weights.

Straight on `tokenizers` and jinja2, rendered as transformers renders: its AutoTokenizer imports torch, which
costs the node process five seconds at start and 200 MB.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from node.models.errors import ModelError

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


def _bytes_of_chars() -> dict[str, int]:
    """How byte-level vocabularies (GPT-2's and after) spell: printable Latin-1 as itself, other bytes from
    U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = _bytes_of_chars()


class ChatTokenizer:
    """Thread-safe. Raises ModelError when the bundle has no readable tokenizer."""

    def __init__(self, bundle_dir: Path, eos_token_ids: tuple[int, ...] = ()) -> None:
        path = bundle_dir / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{bundle_dir} has no tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            # The tokenizers library raises bare Exception for every kind of damage.
            raise ModelError(f"{path} is damaged ({str(error)[:100]})") from error
        self._is_byte_level = "ByteLevel" in str(self._tokenizer.decoder)
        config = _read_config(bundle_dir / "tokenizer_config.json")
        self._special_tokens = {name: _token_text(config.get(name)) for name in _SPECIAL_NAMES}
        self._template = _compile(_chat_template(bundle_dir, config), bundle_dir)
        self.eos_token_ids = eos_token_ids or self._ids_of(self._special_tokens["eos_token"])

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def apply_chat_template(self, messages: Sequence[Mapping[str, object]]) -> list[int]:
        """Raises ModelError when the model has no template or the template refuses the messages."""
        if self._template is None:
            raise ModelError("this model has no chat template; use completions instead")
        try:
            text = self._template.render(
                messages=list(messages), add_generation_prompt=True, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ModelError(f"the chat template refuses these messages: {error}") from error
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        """What this token alone adds to a text: perhaps part of a character. Special ones by their names."""
        piece = self._tokenizer.id_to_token(token_id) or ""
        if not self._is_byte_level:
            # Pieces as SentencePiece writes them.
            byte = _BYTE_PIECE.fullmatch(piece)
            return bytes.fromhex(byte[1]) if byte else piece.replace("\u2581", " ").encode()
        known = all(char in _BYTE_OF for char in piece)
        return bytes(_BYTE_OF[char] for char in piece) if known else piece.encode()

    def _ids_of(self, token: str) -> tuple[int, ...]:
        token_id = self._tokenizer.token_to_id(token)
        return () if token_id is None else (token_id,)


def _read_config(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged ({error})") from error
    return config if isinstance(config, dict) else {}


def _token_text(value: object) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _chat_template(bundle_dir: Path, config: Mapping[str, object]) -> str | None:
    path = bundle_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _compile(template: str | None, bundle_dir: Path) -> jinja2.Template | None:
    if template is None:
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ModelError(f"the chat template in {bundle_dir} is damaged ({error})") from error


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
