"""A folder and a tar archive, read alike: the names of the files, and a function that opens one of them."""

import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from engine.errors import UserError
from engine.files import check_regular


@dataclass(frozen=True)
class FileTree:
    """The files below a folder or in an archive; names have forward slashes, an archive's are in its own order."""

    path: Path
    names: list[str]
    open: Callable[[str], IO[bytes]]

    def read(self, name: str) -> bytes:
        """The contents of one file. Raises UserError where the archive is truncated or damaged."""
        with _archive_errors(self.path), self.open(name) as file:
            return file.read()


@contextmanager
def open_tree(path: Path, file: IO[bytes] | None = None) -> Iterator[FileTree]:
    """The files of the folder `path`, or of the tar archive `path` (compressed or not; open already as `file`).

    Nothing is unpacked: members of an archive are only read, so its paths and links cannot lead anywhere.
    Raises UserError when `path` is neither a folder nor a whole tar archive.
    """
    if file is None and path.is_dir():
        names = sorted(found.relative_to(path).as_posix() for found in path.rglob("*") if found.is_file())
        yield FileTree(path, names, lambda name: (path / name).open("rb"))
        return
    with _archive_errors(path):
        check_regular(path)
        archive = tarfile.open(path, fileobj=file)
    with archive:
        with _archive_errors(path):
            found = archive.getmembers()
            while archive.fileobj and archive.fileobj.read(2**20):  # a checksum of what is compressed is at its end
                pass
            members = {member.name.removeprefix("./"): member for member in found if is_plain(member)}

        def open_member(name: str) -> IO[bytes]:
            opened = archive.extractfile(members[name]) if name in members else None
            if opened is None:
                raise FileNotFoundError(f"{path} has no {name}")
            return opened

        yield FileTree(path, list(members), open_member)


def is_plain(member: tarfile.TarInfo) -> bool:
    """Whether a member is a file of as many bytes as the archive has of it: a sparse one may claim any number."""
    return member.isreg() and not member.issparse()


@contextmanager
def _archive_errors(path: Path) -> Iterator[None]:
    """Damage to an archive, as one line."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:  # damage makes tarfile and the decompressors raise nearly any exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"'{path}' is truncated or not a tar archive ({reason}): get the file again") from None
