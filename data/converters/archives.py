"""A folder and a tar archive, read alike: the names of the files, and a function that reads one of them."""

import io
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UserError
from engine.files import check_regular


@dataclass(frozen=True)
class FileTree:
    """The files below a folder or in an archive; names have forward slashes, those of an archive are in its own order.

    `read` gives the bytes of one file; it raises FileNotFoundError when there is none of this name.
    """

    path: Path
    names: list[str]
    read: Callable[[str], bytes]


@contextmanager
def open_tree(path: Path, content: bytes | None = None) -> Iterator[FileTree]:
    """The files of the folder `path`, or of the tar archive `path` (compressed or not; its bytes may be given).

    Nothing is unpacked: members of an archive are only read, so its paths and links cannot lead anywhere.
    Raises UserError when `path` is neither a folder nor a whole tar archive.
    """
    if content is None and path.is_dir():
        names = sorted(found.relative_to(path).as_posix() for found in path.rglob("*") if found.is_file())
        yield FileTree(path, names, lambda name: (path / name).read_bytes())
        return
    with _archive_errors(path):
        check_regular(path)
        archive = tarfile.open(path, fileobj=None if content is None else io.BytesIO(content))
    with archive:
        with _archive_errors(path):
            # A sparse member may claim any number of bytes.
            found = [member for member in archive.getmembers() if member.isreg() and not member.issparse()]
            while archive.fileobj and archive.fileobj.read(2**20):  # a checksum of what is compressed is at its end
                pass
        members = {member.name.removeprefix("./"): member for member in found}

        def read(name: str) -> bytes:
            with _archive_errors(path):
                file = archive.extractfile(members[name]) if name in members else None
                if file is None:
                    raise FileNotFoundError(f"{path} has no {name}")
                return file.read()

        yield FileTree(path, list(members), read)


@contextmanager
def _archive_errors(path: Path) -> Iterator[None]:
    """Damage to an archive, as one line."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # damage makes tarfile and the decompressors raise nearly any exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"'{path}' is truncated or not a tar archive ({reason}): get the file again") from None
