"""The one exception that ends a command with a single clear line instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the person at the keyboard can understand and change; `str()` is the whole line."""
