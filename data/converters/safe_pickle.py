"""Read a pickle of numpy arrays and plain containers, without running it, and tell labels and images among them.

A pickle is a program: the standard unpickler calls whatever function it names. As the standard library documents under
"Restricting Globals", find_class allows what arrays and containers need, and refuses any other name.
"""

import codecs
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from engine.errors import UserError, one_line
from engine.files import check_regular
from engine.foreign import NumberType


class NumberArray(np.ndarray[Any, Any]):
    """What a pickled array becomes: an array whose type is a NumberType in the pickle."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take shape, type and content. Raises an exception when they do not agree."""
        shape, kind, column_order, data = state[-4:]
        super().__setstate__((1, shape, kind.dtype, column_order, data))


def array_of_bytes(data: bytes | str, kind: NumberType, shape: tuple[int, ...], order: Any, *_: object) -> NDArray[Any]:
    """An array as protocol 5 pickles it, or a number; `data` is a str where Python 2 has written it."""
    content = data.encode("latin1") if isinstance(data, str) else bytes(data)
    return np.frombuffer(content, kind.dtype).reshape(shape, order=order)


ALLOWED: dict[str, Any] = {
    "numpy.ndarray": None,  # an argument of _reconstruct
    "numpy.dtype": NumberType,
    "numpy.core.multiarray._reconstruct": lambda *_: np.empty(0, np.uint8).view(NumberArray),
    "numpy.core.multiarray.scalar": lambda kind, data: array_of_bytes(data, kind, (1,), "C")[0],
    "numpy.core.numeric._frombuffer": array_of_bytes,
    "_codecs.encode": codecs.encode,  # how Python 3 writes bytes for Python 2
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
}


class ArrayUnpickler(pickle.Unpickler):
    """The standard library's unpickler, for the names in ALLOWED alone."""

    def find_class(self, module: str, name: str) -> Any:
        """The object that a name in the pickle stands for. Raises UnpicklingError when it is not allowed."""
        # numpy 2 renamed numpy.core, and Python 3 __builtin__.
        full_name = f"{module}.{name}".replace("numpy._core.", "numpy.core.").replace("__builtin__.", "builtins.")
        if full_name not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; only numpy arrays and containers are read")
        return ALLOWED[full_name]


def load_pickle(file: IO[bytes], name: str) -> Any:
    """The object pickled in `file`; strings of Python 2 come as str.

    Raises UserError when the file is truncated, is no pickle, or asks for anything but arrays and plain containers.
    """
    try:
        with warnings.catch_warnings():  # of numpy, about the ways in which its old versions pickled
            warnings.simplefilter("ignore")
            return ArrayUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a broken pickle fails anywhere in the unpickler, with nearly any exception
        reason = one_line(error, 200)
        raise UserError(f"'{name}' cannot be read as a pickle ({reason}): get the file again") from None


def load_pickle_file(path: Path) -> Any:
    """The object pickled in a regular file. Raises UserError when it is none, damaged, or holds anything else."""
    try:
        check_regular(path)
    except ValueError as error:
        raise UserError(f"'{path}' cannot be read: {error}") from None
    with path.open("rb") as file:
        return load_pickle(file, str(path))


def whole_numbers(values: object, where: str, below: int | None = None) -> list[int]:
    """Labels or rows, from an array or list of somebody's file.

    Raises UserError, which begins with `where`, when they are not whole numbers from 0, all of them less than `below`.
    """
    try:
        array = np.asarray(values)
        if array.ndim != 1 or array.size and (array.dtype.kind not in "iu" or array.min() < 0):
            raise ValueError(f"they have shape {array.shape} and type {array.dtype}")
        if below is not None and array.max(initial=0) >= max(below, 1):
            raise ValueError(f"the largest is {array.max()}, of {below}")
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{where} are not whole numbers from 0 ({one_line(error)})") from None
    return [int(value) for value in array]


def are_images(array: object) -> TypeGuard[NDArray[np.uint8]]:
    """Whether something is an array of images (n, h, w, 3) uint8."""
    return isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] == 3
