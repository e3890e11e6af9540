"""Writing a file so that it is either the old one or the new one, never half of one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from data.errors import UserError


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` when the block ends without an error.

    Raises UserError when it cannot be written; the file that was there before is then intact, and nothing is left
    of the new one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be written ({reason}): free some space or give another folder") from error
