"""Files that are either the old one or the new one, never half of one; reading them, running nothing; hashes."""

import contextlib
import glob
import hashlib
import json
import os
import platform
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import IO, Any, NoReturn, get_args, get_origin

import torch
from torch import Tensor, nn

from engine.errors import UserError, one_line

# The keys that a record must have, or may have where they end in "?"; the type of each value, or a Schema of it.
Schema = dict[str, Any]
# The type of a run's flags in a file.
FLAGS = dict[str, str | float | bool | None | list[str | float]]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes `path`: what the system refuses becomes a UserError that names it."""
    try:
        yield
    except OSError as error:
        reason = one_line(error)
        raise UserError(f"{path} cannot be written ({reason}): free some space or give another folder") from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` when the block ends without an error.

    Raises UserError when it cannot be written; the file that was there before is then intact, and nothing is left
    of the new one. What a process of this machine that was killed has left of it is removed.
    """
    start = f".{path.name}.{platform.node()}."
    temporary = path.with_name(f"{start}{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob(f"{glob.escape(start)}*.tmp"):
            if is_gone(other.name.removeprefix(start).removesuffix(".tmp")):
                other.unlink(missing_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def is_gone(pid: str) -> bool:
    """Whether no process of this machine has this id; False where that cannot be known."""
    if os.name != "posix" or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # it is another user's
        pass
    return False


def save_atomically(path: Path, content: dict[str, Any] | Tensor) -> None:
    """Write `content` so that the file is either the old one or the new one, never half of one.

    Raises UserError when it cannot be written; the file that was there before is then intact.
    """
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # which torch.save makes of a full disk, and of Ctrl-C
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise OSError(str(error)) from error
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, atomically. Raises UserError when it cannot be written."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cpu_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict to be saved: its tensors on the CPU and contiguous."""
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def load_tensors(path: Path) -> Any:
    """The content of a file of torch.save, on the CPU, running nothing of it.

    Raises ValueError, with the reason in one line, when the file is damaged, of the format of torch before 1.6, or
    holds more than tensors and plain values; OSError when it cannot be opened.
    """
    check_regular(path)
    with open(path, "rb") as file:
        start = file.read(2)
        try:  # torch.load compares no checksum, and unpacks records that are compressed or share bytes
            if start != b"PK":
                raise zipfile.BadZipFile  # although there may be a zip at its end: torch.load looks at the start
            records = zipfile.ZipFile(file)
            n_bytes = sum(record.file_size for record in records.infolist())
            damaged = n_bytes > path.stat().st_size or records.testzip() is not None
        except Exception as error:  # a damaged file makes zipfile raise nearly any exception
            raise ValueError("it is no file of torch.save, or only the beginning of one") from error
        if damaged:
            raise ValueError("its records do not fit their checksums, or take more bytes than it has")
        file.seek(0)
        return read_tensors(file)


def load_kept(path: Path) -> Any:
    """The content of a file that keeps what may be computed again; None where it is not there, or damaged."""
    with contextlib.suppress(OSError, ValueError):
        return load_tensors(path)
    return None


class AsksFor(ValueError):
    """A file holds more than tensors and plain values: it asks for the class or function `name`."""

    def __init__(self, name: str):
        super().__init__(f"it asks for {name[:80]}; only tensors and plain values are read")
        self.name = name


def read_tensors(file: IO[bytes]) -> Any:
    """The content of an open file of torch.save, of any format, on the CPU, running nothing of it.

    Raises ValueError, with the reason in one line, when it is damaged, and AsksFor when it asks for a class or function
    that torch does not count as safe (see torch.serialization.safe_globals).
    """
    try:
        with warnings.catch_warnings():  # of an odd pickle: what comes of it is said in the one line
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise nearly any exception
        text = one_line(error)
        asked = re.search(r"GLOBAL (\S+)", text)
        if asked:  # torch's own words go on to how one would run it
            raise AsksFor(asked[1]) from error
        text = text.rpartition("WeightsUnpickler error: ")[2].partition(" Check the documentation of torch.load")[0]
        raise ValueError(text[:120]) from error


def read_json(path: Path, lines: bool = False) -> Any:
    """What a JSON file holds, or with `lines` a list of what each of its lines does.

    Raises ValueError, with the reason in one line, when it is damaged or holds NaN or infinity, which are written as
    null; OSError when it cannot be opened.
    """
    check_regular(path)
    text = path.read_text(encoding="utf-8")
    parts = text.splitlines() if lines else [text]
    try:
        found = [json.loads(part, parse_constant=no_number) for part in parts]
        return found if lines else found[0]
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def no_number(text: str) -> NoReturn:
    """Raise ValueError for what json takes for a number: NaN, Infinity or -Infinity."""
    raise ValueError(f"it holds {text}, which is no number")


def check_regular(path: Path) -> None:
    """Raise ValueError when there is something else than a file, such as a pipe, on which reading would wait."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")


def read_record(path: Path, form: str, schema: Schema, what: str, remedy: str) -> dict[str, Any]:
    """A dictionary of tensors and plain values that save_atomically wrote, on the CPU, running nothing of it.

    Raises UserError, in one line with the remedy, when the file is missing or damaged, when its `format` is not `form`,
    or when it lacks a key of the schema or has one of another type.
    """
    try:
        record = load_tensors(path)
        if not isinstance(record, dict) or record.get("format") != form:
            raise ValueError(f"it has no format {form!r}")
        if wrong := misfit(record, schema):
            raise ValueError(wrong)
    except FileNotFoundError:
        raise UserError(f"no {what} {path}: {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a {what} of this project, or is damaged ({error}): {remedy}") from error
    return record


def misfit(record: dict[str, Any], schema: Schema) -> str:
    """The first key of the schema that a record lacks, or has of another type, in words; empty when there is none."""
    for key, kind in schema.items():
        name = key.removesuffix("?")
        if name not in record and name == key:
            return f"it lacks {key!r}"
        if name in record and not matches_schema(record[name], kind):
            return f"its {name!r} is of another type"
    return ""


def matches_schema(value: Any, kind: Any) -> bool:
    """Whether a value is of a type: a class, a union, list[...], dict[...], a Schema, or [Schema] for a list of them.

    An int, of 64 bits, will do for a float; a str is valid UTF-8; the storage of a Tensor holds all its elements.
    """
    if isinstance(kind, dict):
        return isinstance(value, dict) and not misfit(value, kind)
    origin, parts = (list, kind) if isinstance(kind, list) else (get_origin(kind), get_args(kind))
    if origin is UnionType:
        return any(matches_schema(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(matches_schema(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            matches_schema(k, parts[0]) and matches_schema(v, parts[1]) for k, v in value.items()
        )
    if isinstance(value, bool):
        return kind is bool
    if not isinstance(value, int | float if kind is float else kind):
        return False
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    if isinstance(value, str):
        return is_text(value)
    if isinstance(value, Tensor):
        return value.layout == torch.strided and not value.is_meta and value.nbytes <= value.untyped_storage().nbytes()
    return True


def is_text(value: str) -> bool:
    """Whether a text can be encoded as UTF-8, as one with a lone surrogate cannot."""
    return value == value.encode("utf-8", "ignore").decode()


def folder_name(name: str) -> str:
    """A name that becomes a part of a path. Raises UserError when it is not the name of one folder."""
    if name in ("", ".", "..") or not name.isprintable() or set(name) & {"/", "\\"}:
        raise UserError(f"{name!r} is not the name of one folder: give one without separators and control characters")
    return name


def weights_digest(module: nn.Module, *facts: object) -> str:
    """A hash, 16 characters, of all weights and statistics of a module, and of the facts if any are given."""
    digest = hashlib.sha256(str(facts).encode() if facts else b"")
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
