"""A folder, a tar and a zip archive, read alike: the names of the files, and a function that reads one of them."""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.errors import UserError, one_line
from engine.files import check_regular


@dataclass(frozen=True)
class FileTree:
    """The files below a folder or in an archive, hidden ones left out, such as a Mac's ._1.png in a zip.

    Names have forward slashes; those of an archive are in its own order. contents: what reads each file.
    """

    path: Path
    names: list[str]
    contents: dict[str, Callable[[], bytes]]

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises FileNotFoundError when there is none of this name."""
        if name not in self.contents:
            raise FileNotFoundError(f"{self.path} has no {name}")
        return self.contents[name]()


def is_archive(path: Path) -> bool:
    """Whether something is a file that begins as a zip or a tar archive."""
    return path.is_file() and (_is_zip(path) or tarfile.is_tarfile(path))


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


@contextmanager
def open_tree(path: Path, content: bytes | None = None) -> Iterator[FileTree]:
    """The files of the folder `path`, or of the zip or tar archive `path` (of a tar, its bytes may be given).

    Nothing is unpacked: members of an archive are only read, so its paths and links cannot lead anywhere.
    Raises UserError when `path` is neither a folder nor a whole archive.
    """
    if content is None and path.is_dir():
        # Links to folders are followed, as to where the images are on another disk.
        files = (Path(folder, file) for folder, _, files in os.walk(path, followlinks=True) for file in files)
        files = (file for file in files if file.name[0] != "." and file.is_file())
        contents = {file.relative_to(path).as_posix(): file.read_bytes for file in files}
        yield FileTree(path, sorted(contents), contents)
        return
    members: dict[str, Callable[[], Any]]  # what opens each
    with ExitStack() as stack:
        with _archive_errors(path):
            check_regular(path)
            if content is None and _is_zip(path):
                zipped = stack.enter_context(zipfile.ZipFile(path))
                infos = [info for info in zipped.infolist() if not info.is_dir()]
                members = {info.filename.replace("\\", "/"): partial(zipped.open, info) for info in infos}
            else:
                tar = stack.enter_context(tarfile.open(path, fileobj=None if content is None else io.BytesIO(content)))
                # A sparse member may claim any number of bytes.
                found = [member for member in tar.getmembers() if member.isreg() and not member.issparse()]
                while tar.fileobj and tar.fileobj.read(2**20):  # a checksum of what is compressed is at its end
                    pass
                members = {member.name.removeprefix("./"): partial(tar.extractfile, member) for member in found}
        names = [name for name in members if name.rpartition("/")[2][:1] != "."]
        yield FileTree(path, names, {name: partial(_read_member, path, members[name]) for name in members})


def _read_member(archive: Path, opened: Callable[[], Any]) -> bytes:
    with _archive_errors(archive), opened() as file:
        return file.read()


@contextmanager
def _archive_errors(path: Path) -> Iterator[None]:
    """Damage to an archive, as one line."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # damage makes tarfile and the decompressors raise nearly any exception
        reason = one_line(error)
        raise UserError(f"'{path}' is truncated, or no tar or zip archive ({reason}): get it again") from None
