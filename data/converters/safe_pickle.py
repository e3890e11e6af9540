"""Read a pickle of numpy arrays and plain containers, without running it and without loading its arrays.

Benchmarks are shared as pickles from anywhere, and a pickle is a program: the standard unpickler calls whatever
function it names. Here the few names that pickled numpy arrays need stand for small classes of this file, any other
name is refused, and so nothing outside this file is ever called.

A pickle also holds gigabytes of pixels, of which a converter needs one image at a time. The file is therefore mapped
into memory, and arrays are views of it: what is not used of them is never read.
"""

import math
import mmap
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from engine.errors import UserError
from engine.files import check_regular

LONG = 1024  # bytes; longer byte strings stay in the file

Array = np.ndarray[Any, Any]


class StoredType:
    """What a pickled numpy dtype becomes: numbers and booleans only."""

    def __init__(self, code: str, *_: object) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufSU":
            raise pickle.UnpicklingError(f"it has an array of type {code!r}; only numbers are read")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class StoredArray:
    """What a pickled numpy array becomes: `array`, read-only, which np.asarray gives too."""

    __slots__ = ("array",)  # a list may hold half a million of them

    def __init__(self) -> None:
        self.array: Array = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, stored_type, column_order, data = state[-4:]
        self.fill(data, stored_type, shape, "F" if column_order else "C")

    def fill(self, data: object, stored_type: StoredType, shape: tuple[int, ...], order: Any) -> "StoredArray":
        """Set type, shape and contents. Raises UnpicklingError where they do not agree."""
        if isinstance(data, str):  # a short byte string of Python 2
            data = data.encode("latin1")
        if isinstance(data, bytes | bytearray):
            data = np.frombuffer(data, np.uint8)
        if not isinstance(data, np.ndarray) or not isinstance(stored_type, StoredType):
            raise pickle.UnpicklingError("it has an array whose contents are not bytes")
        shape = tuple(int(side) for side in shape)
        if data.size != math.prod(shape) * stored_type.dtype.itemsize:
            raise pickle.UnpicklingError(f"it has an array of shape {shape} and {data.size} bytes")
        self.array = data.view(stored_type.dtype).reshape(shape, order=order)
        return self

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self.array if dtype is None else self.array.astype(dtype)


def load_pickle(file: IO[bytes], name: str) -> Any:
    """The object pickled in `file`, from its beginning. Arrays are `StoredArray`, which outlive the file's closing.

    Strings of Python 2 come as str. Raises UserError, naming `name`, when the file is truncated, is no pickle, or holds
    anything but arrays of numbers, strings, numbers and plain containers.
    """
    try:
        return _Unpickler(file).load()
    except pickle.UnpicklingError as error:
        raise UserError(f"'{name}' cannot be read: {error}") from None
    except Exception as error:  # a broken pickle fails anywhere in the unpickler, with nearly any exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(f"'{name}' is truncated or not a pickle ({reason}); get the file again") from None


def load_pickle_file(path: Path) -> Any:
    """The same of the file at `path`. Raises UserError also when it is no regular file."""
    try:
        check_regular(path)
    except ValueError as error:
        raise UserError(f"'{path}' cannot be read: {error}") from None
    with path.open("rb") as file:
        return load_pickle(file, str(path))


def _mapped(file: IO[bytes]) -> mmap.mmap | bytes:
    """The contents of a file, in memory where they are used; what is empty or not on the disk is read."""
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        content = file.read()
        file.seek(0)
        return content


# The interpreter's C unpickler cannot be told to leave bytes in the file, so this builds on its twin written in Python.
class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    read: Callable[[int], bytes]
    stack: list[Any]

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin1")
        self._file = file
        self._contents: Array = np.frombuffer(_mapped(file), np.uint8)

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for."""
        allowed: dict[str, Any] = {
            "numpy ndarray": StoredArray,
            "numpy dtype": StoredType,
            "multiarray _reconstruct": lambda *_: StoredArray(),
            "multiarray scalar": lambda kind, data: StoredArray().fill(data, kind, (1,), "C").array[0],
            "numeric _frombuffer": lambda data, kind, shape, order, *_: StoredArray().fill(data, kind, shape, order),
            "_codecs encode": _latin1,
            "collections OrderedDict": OrderedDict,
            "builtins set": set,
        }
        if not module or not name:
            raise EOFError("a name is cut short")
        # numpy 2 renamed numpy.core to numpy._core, and Python 3 __builtin__ to builtins.
        module = module.replace("__builtin__", "builtins")
        for prefix in ("numpy.core.", "numpy._core."):
            module = module.removeprefix(prefix)
        if f"{module} {name}" not in allowed:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and only numpy arrays and plain containers are read: "
                "do not open this file with other tools unless you trust whoever made it"
            )
        return allowed[f"{module} {name}"]

    def persistent_load(self, pid: object) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file")

    def take(self, length: int) -> bytes | Array:
        """The next bytes: read, or, when they are many, as a part of the file."""
        if length < LONG:
            return self.read(length)
        start = self._file.tell()
        taken = self._contents[start : start + length]
        if taken.size < length:
            raise EOFError("a byte string runs past the end of the file")
        self._file.seek(length, os.SEEK_CUR)
        return taken

    def load_frame(self) -> None:
        """Frames only tell a reader how much to fetch at once; inside one, places in the file would be lost."""
        self.read(8)

    def load_build(self) -> None:
        """Only our own stand-ins have a state to set."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (StoredArray, StoredType)):
            raise pickle.UnpicklingError(f"it sets the state of a {type(self.stack[-1]).__name__}")
        self.stack[-1].__setstate__(state)


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it has bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _load_bytes(length_format: str, decode: Callable[[bytes], str | bytes]) -> Callable[[Any], None]:
    """The opcode of a byte string whose length is written as `length_format`."""

    def load(unpickler: Any) -> None:
        (length,) = struct.unpack(length_format, unpickler.read(struct.calcsize(length_format)))
        if length < 0:
            raise pickle.UnpicklingError("it has a byte string of negative length")
        taken = unpickler.take(length)
        unpickler.append(decode(taken) if isinstance(taken, bytes) else taken)

    return load


_Unpickler.dispatch |= {
    pickle.FRAME[0]: _Unpickler.load_frame,
    pickle.BUILD[0]: _Unpickler.load_build,
    pickle.BINSTRING[0]: _load_bytes("<i", lambda data: data.decode("latin1")),
    pickle.BINBYTES[0]: _load_bytes("<I", bytes),
    pickle.BINBYTES8[0]: _load_bytes("<Q", bytes),
    pickle.BYTEARRAY8[0]: _load_bytes("<Q", bytes),
}
