"""Read a pickle of numpy arrays and plain containers, without running it and without loading its arrays.

Benchmarks are shared as pickles from anywhere, and a pickle is a program: the standard unpickler calls whatever
function it names. Here the few names that pickled numpy arrays need stand for small classes of this file, any other
name is refused, and so nothing outside this file is ever called.

A pickle also holds gigabytes of pixels, of which a converter needs one image at a time. Long byte strings are
therefore left in the file: only their place is noted, and a `StoredArray` reads its rows on demand.
"""

import math
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, ClassVar, NamedTuple

import numpy as np

from engine.errors import UserError

LONG = 1024  # bytes; longer byte strings stay in the file


class Span(NamedTuple):
    """A byte string that was left in the file."""

    offset: int
    length: int


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
    """A numpy array of the pickle: `.shape`, `.dtype`, `len`, row i as `array[i]`, all of it as `np.asarray(array)`."""

    __slots__ = ("_data", "_file", "dtype", "shape")  # a list may hold half a million of them

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.shape: tuple[int, ...] = ()
        self.dtype = np.dtype("u1")
        self._data: bytes | Span = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, stored_type, column_order, data = state[-4:]
        self.fill(data, stored_type, shape, "F" if column_order else "C")

    def fill(self, data: object, stored_type: StoredType, shape: tuple[int, ...], order: str) -> "StoredArray":
        """Set type, shape and contents. Raises UnpicklingError where they do not agree."""
        if isinstance(data, str):  # a short byte string of Python 2
            data = data.encode("latin1")
        if not isinstance(data, (bytes, bytearray, Span)) or not isinstance(stored_type, StoredType):
            raise pickle.UnpicklingError("it has an array whose contents are not bytes")
        if order == "F" and sum(side > 1 for side in shape) > 1:
            raise pickle.UnpicklingError("it has an array in column order; save np.ascontiguousarray(array) instead")
        self.shape, self.dtype = tuple(int(side) for side in shape), stored_type.dtype
        self._data = data if isinstance(data, Span) else bytes(data)
        length = data.length if isinstance(data, Span) else len(data)
        if length != math.prod(self.shape) * self.dtype.itemsize:
            raise pickle.UnpicklingError(f"it has an array of shape {self.shape} and {length} bytes")
        return self

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int) -> np.ndarray[Any, Any]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        return np.frombuffer(self._bytes(i * size, size), self.dtype).reshape(self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        array = np.frombuffer(self.tobytes(), self.dtype).reshape(self.shape)
        return array if dtype is None else array.astype(dtype)

    def tobytes(self) -> bytes:
        return self._bytes(0, math.prod(self.shape) * self.dtype.itemsize)

    def _bytes(self, start: int, size: int) -> bytes:
        if isinstance(self._data, bytes):
            return self._data[start : start + size]
        self._file.seek(self._data.offset + start)
        return self._file.read(size)


def load_pickle(file: IO[bytes], name: str) -> Any:
    """The object pickled in `file` (seekable, to be kept open while its arrays are used); arrays are `StoredArray`.

    Strings of Python 2 come as str. Raises UserError, naming `name`, when the file is truncated, is no pickle, or holds
    anything but arrays of numbers, strings, numbers and plain containers.
    """
    try:
        return _Unpickler(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise UserError(f"'{name}' cannot be read: {error}") from None
    except Exception as error:  # a broken pickle fails anywhere in the unpickler, with nearly any exception
        raise UserError(
            f"'{name}' is truncated or not a pickle ({type(error).__name__}: {error}); get the file again"
        ) from None


# The interpreter's C unpickler cannot be told to leave bytes in the file, so this builds on its twin written in Python.
class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    read: Callable[[int], bytes]
    stack: list[Any]

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        self._file = file
        start = file.tell()
        self._end = file.seek(0, os.SEEK_END)
        file.seek(start)

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for."""
        allowed: dict[str, Any] = {
            "numpy ndarray": StoredArray,
            "numpy dtype": StoredType,
            "multiarray _reconstruct": lambda *_: StoredArray(self._file),
            "multiarray scalar": lambda kind, data: StoredArray(self._file).fill(data, kind, (1,), "C")[0],
            "numeric _frombuffer": lambda data, kind, shape, order, *_: StoredArray(self._file).fill(
                data, kind, shape, order
            ),
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

    def _long_or_none(self, length: int) -> Span | None:
        """A place in the file for a byte string that starts here, when it is long; then the string is skipped."""
        if length < LONG:
            return None
        span = Span(self._file.tell(), length)
        if span.offset + length > self._end:
            raise EOFError("a byte string runs past the end of the file")
        self._file.seek(length, os.SEEK_CUR)
        return span

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
        span = unpickler._long_or_none(length)
        unpickler.append(decode(unpickler.read(length)) if span is None else span)

    return load


_Unpickler.dispatch |= {
    pickle.FRAME[0]: _Unpickler.load_frame,
    pickle.BUILD[0]: _Unpickler.load_build,
    pickle.BINSTRING[0]: _load_bytes("<i", lambda data: data.decode("latin1")),
    pickle.BINBYTES[0]: _load_bytes("<I", bytes),
    pickle.BINBYTES8[0]: _load_bytes("<Q", bytes),
    pickle.BYTEARRAY8[0]: _load_bytes("<Q", bytes),
}
