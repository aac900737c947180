"""A file for its owner's eyes that is there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from node.errors import UserError


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Takes the place of `path` when the block ends well. Raises UserError when it cannot be written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        # Of a process that was killed: in a container the next has the same id.
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
