"""Files that are either the old one or the new one, never half of one; tensors in them; a hash of weights."""

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import UserError


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


def save_atomically(path: Path, content: dict[str, Any] | Tensor) -> None:
    """Write `content` so that the file is either the old one or the new one, never half of one.

    Raises UserError when it cannot be written; the file that was there before is then intact.
    """
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def load_tensors(path: Path, device: torch.device | str) -> Any:
    """The content of a file of save_atomically, on `device`, running nothing of it.

    A damaged file makes the unpickler raise nearly any exception, and so may this function.
    """
    if not zipfile.is_zipfile(path):  # torch.load would take it for a bare pickle, which nothing here writes
        raise ValueError("it is no file of torch.save, or only the beginning of one")
    return torch.load(path, map_location=device, weights_only=True)


def weights_digest(module: nn.Module, *facts: object) -> str:
    """A hash, 16 characters, of all weights and statistics of a module, and of the facts if any are given."""
    digest = hashlib.sha256(str(facts).encode() if facts else b"")
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
