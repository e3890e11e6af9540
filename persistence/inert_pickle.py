"""Read any file of torch.save, old or new, without running it.

A pickle is a program: the standard unpickler imports and calls whatever it names. Here the few names that make
tensors, containers and numbers stand for small methods of this file, and every other class becomes an inert record of
its name and state. Nothing else is ever imported or called, and the bytes of a tensor become one only when asked for.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from data.converters.safe_pickle import StoredType
from engine.errors import UserError

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
CONTAINERS = {c.__name__: c for c in (dict, list, tuple, set, frozenset)}
# The first two pickles of a file of torch.save before its version 1.6, which was no zip.
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


@dataclass(frozen=True)
class StoredStorage:
    """A storage of the file: the type and number of its elements."""

    key: str
    dtype: torch.dtype
    n: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file, not read yet: a view of a storage."""

    storage: StoredStorage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self, storages: dict[str, bytes]) -> Tensor:
        """The tensor, copied. Raises UnpicklingError when it does not lie within its storage."""
        numbers = (self.offset, *self.shape, *self.stride)
        if not all(isinstance(n, int) and n >= 0 for n in numbers) or len(self.shape) != len(self.stride):
            raise pickle.UnpicklingError("it has a tensor of impossible shape")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        content = storages.get(self.storage.key, b"")
        n = self.storage.n
        if len(content) != n * self.storage.dtype.itemsize or math.prod(self.shape) > n or not 0 <= last < n:
            raise pickle.UnpicklingError(f"it has a tensor of shape {self.shape} that its bytes do not hold")
        flat = torch.frombuffer(bytearray(content), dtype=self.storage.dtype)
        return flat.as_strided(self.shape, self.stride, self.offset).clone()


class Inert:
    """What an object of any other class becomes: the name of the class, and its state; it does nothing."""

    name = ""
    state: Any = None

    def __init__(self, *_: object, **__: object) -> None:
        """What the object was made from: left out."""

    def append(self, _: object) -> None:
        """An item of a subclass of list: left out."""

    def __setitem__(self, key: object, value: object) -> None:
        """An item of a subclass of dict: left out."""


# The unpickler written in Python: in the one written in C, a few bytes of a hostile file can claim all memory.
class InertUnpickler(pickle._Unpickler):
    """Unpickles tensors as StoredTensor, containers and numbers as they are, and all else as Inert."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin1")
        self.n_bytes: dict[str, int] = {}  # of each storage that was named

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for."""
        if module in ("torch", "torch.cuda") and name in STORAGES:
            return STORAGES[name]
        if module in ("builtins", "__builtin__") and name in CONTAINERS:
            return CONTAINERS[name]
        allowed = {
            "collections.OrderedDict": OrderedDict,
            "collections.defaultdict": self.default_dict,
            "torch.Size": tuple,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_parameter": self.parameter,
            "numpy.dtype": StoredType,
            "numpy.core.multiarray.scalar": self.scalar,
            "numpy._core.multiarray.scalar": self.scalar,
            "_codecs.encode": self.latin1,
        }
        full_name = f"{module}.{name}"
        return allowed[full_name] if full_name in allowed else type("Inert", (Inert,), {"name": full_name})

    def persistent_load(self, pid: Any) -> Any:
        """A storage; or, in old files, a class with its source code, which is as inert as any other."""
        if pid[0] == "module":
            return pid[1]
        kind, dtype, key, _, n, *view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(n, int) or n < 0 or any(view):
            raise pickle.UnpicklingError("it has a storage of an unknown kind")
        self.n_bytes[str(key)] = n * dtype.itemsize
        return StoredStorage(str(key), dtype, n)

    def default_dict(self, *_: object) -> dict[Any, Any]:
        """A defaultdict, without what it would make for a missing key."""
        return {}

    def tensor(self, storage: object, offset: int, shape: Any, stride: Any, *_: object) -> StoredTensor:
        """A tensor, not read yet."""
        if not isinstance(storage, StoredStorage):
            raise pickle.UnpicklingError("it has a tensor without a storage")
        return StoredTensor(storage, offset, tuple(shape), tuple(stride))

    def parameter(self, data: object, *_: object) -> object:
        """A parameter is its tensor."""
        return data

    def scalar(self, kind: object, data: object) -> Any:
        """A numpy scalar, as a Python number."""
        if not isinstance(kind, StoredType) or not isinstance(data, bytes) or len(data) != kind.dtype.itemsize:
            raise pickle.UnpicklingError("it has a numpy scalar that is not a number")
        return np.frombuffer(data, kind.dtype)[0].item()

    def latin1(self, text: str, _: object) -> bytes:
        """How Python 3 writes bytes for Python 2."""
        return text.encode("latin1")

    def load_build(self) -> None:
        """Keep the state of an inert record or a type; that of anything else has no meaning here."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], StoredType):
            self.stack[-1].__setstate__(state)
        elif isinstance(self.stack[-1], Inert):
            self.stack[-1].state = state


InertUnpickler.dispatch[pickle.BUILD[0]] = InertUnpickler.load_build


def read_zip(path: Path) -> tuple[Any, dict[str, bytes]]:
    """The object and the storages of a zip of torch.save, which stores every member as it is."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        squeezed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if squeezed or sum(member.file_size for member in members) > path.stat().st_size:
            raise pickle.UnpicklingError("its zip is compressed, which torch.save never does")
        contents = {member.filename.partition("/")[2]: archive.read(member) for member in members}
    if contents.get("byteorder", b"little") != b"little":
        raise pickle.UnpicklingError("it was written on a big-endian machine")
    if "data.pkl" not in contents:
        raise pickle.UnpicklingError("its zip has no data.pkl")
    storages = {name.removeprefix("data/"): data for name, data in contents.items() if name.startswith("data/")}
    return InertUnpickler(io.BytesIO(contents["data.pkl"])).load(), storages


def read_legacy(path: Path) -> tuple[Any, dict[str, bytes]]:
    """The object and the storages of a file of torch.save before its version 1.6: pickles, then numbers and bytes."""
    file = io.BytesIO(path.read_bytes())
    if InertUnpickler(file).load() != LEGACY_MAGIC or InertUnpickler(file).load() != LEGACY_PROTOCOL:
        raise pickle.UnpicklingError("it is no file of torch.save")
    if InertUnpickler(file).load().get("little_endian") is not True:
        raise pickle.UnpicklingError("it was written on a big-endian machine")
    unpickler = InertUnpickler(file)
    content = unpickler.load()
    storages = {}
    for key in map(str, InertUnpickler(file).load()):
        file.read(8)  # the number of elements, again
        storages[key] = file.read(unpickler.n_bytes[key])
        if len(storages[key]) != unpickler.n_bytes[key]:
            raise EOFError("its tensors end early")
    return content, storages


def read_torch_file(path: Path) -> tuple[Any, dict[str, bytes]]:
    """The object of a file of torch.save and the bytes of its storages, having run nothing of it.

    Raises UserError when the file is missing, damaged or no such file.
    """
    if not path.is_file():
        raise UserError(f"no file {path}: give the path of the downloaded checkpoint")
    try:
        return (read_zip if zipfile.is_zipfile(path) else read_legacy)(path)
    except Exception as error:  # a broken pickle fails anywhere in the unpickler, with nearly any exception
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path} cannot be read as a file of torch.save ({reason}): get the file again") from None
