"""Files that are either the old one or the new one, never half of one; tensors in them; a hash of weights."""

import contextlib
import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from engine.errors import UserError

# How a file of torch.save begins, by which torch.load tells the formats apart: a zip since torch 1.6, pickles before.
ZIP_START = b"PK\x03\x04"
LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


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
    """The content of a file of torch.save, on `device`, running nothing of it.

    Raises ValueError, with the reason in one line, when the file is damaged, holds more than tensors and plain values,
    or is of the format of torch before 1.6; OSError when it cannot be opened.
    """
    with open(path, "rb") as file:
        start = file.read(len(LEGACY_START))
        if start == LEGACY_START:
            raise ValueError(
                "it has the format of torch before 1.6: convert it with "
                "torch.save(torch.load(FILE, weights_only=True), NEW_FILE)"
            )
        if not start.startswith(ZIP_START):  # torch.load would take it for a bare pickle
            raise ValueError("it is no file of torch.save, or only the beginning of one")
        file.seek(0)
        return read_tensors(file, device)


def read_tensors(file: IO[bytes], device: torch.device | str) -> Any:
    """The content of an open file of torch.save, of any format, on `device`, running nothing of it.

    Raises ValueError, with the reason in one line, when it is damaged or asks for a class or function that torch does
    not count as safe (see torch.serialization.safe_globals).
    """
    try:
        with warnings.catch_warnings():  # of an odd pickle: what comes of it is said in the one line
            warnings.simplefilter("ignore")
            return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise nearly any exception
        text = " ".join(str(error).split()) or type(error).__name__
        asked = re.search(r"GLOBAL (\S+)", text)
        if asked:  # torch's own words go on to how one would run it
            raise ValueError(f"it asks for {asked[1][:80]!r}, and only tensors and plain values are read") from error
        text = text.rpartition("WeightsUnpickler error: ")[2].partition(" Check the documentation of torch.load")[0]
        raise ValueError(text[:120]) from error


def weights_digest(module: nn.Module, *facts: object) -> str:
    """A hash, 16 characters, of all weights and statistics of a module, and of the facts if any are given."""
    digest = hashlib.sha256(str(facts).encode() if facts else b"")
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
