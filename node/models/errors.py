"""The one error of this package: a model that cannot be found, read, or run, said in a line for people."""

from __future__ import annotations

from node.errors import UserError


class ModelError(UserError):
    """`str()` is the whole line: which file or reference, what is wrong with it, what would work."""
