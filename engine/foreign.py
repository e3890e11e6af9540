"""Read a file of torch.save that holds more than tensors, running nothing of it.

Other repositories save their flags (argparse.Namespace), numpy numbers and whole modules beside the weights. torch.load
with weights_only=True refuses a file that asks for such a class; here it is given a stand-in of that name that only
keeps the state, and asked again. Modules that torch never lets a file name (os, sys and the like) stay refused.
"""

import io
import pickle
import pickletools
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.files import AsksFor, load_tensors, read_tensors

# How a file of torch.save before torch 1.6 begins, which was a series of pickles.
LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
MOST_CLASSES = 100  # that a file may ask for


class NumberType:
    """What a pickled dtype becomes, of numbers or strings alone: a wrong state of a dtype would crash numpy."""

    def __init__(self, code: str, *_: object) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufSU":
            raise pickle.UnpicklingError(f"it has an array of type {code!r}; only numbers are read")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take the byte order from the state of a dtype."""
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class Inert:
    """What an object of a foreign class, or the result of a foreign function, becomes: its state, if it has one."""

    state: dict[Any, Any]

    def __new__(cls, *_: object, **__: object) -> "Inert":
        made = super().__new__(cls)
        made.state = {}
        return made

    def __setstate__(self, state: object) -> None:
        """Keep the state, where it is a dictionary, as nearly every object has it."""
        self.state = state if isinstance(state, dict) else {}


def plain_dict(_: object) -> dict[Any, Any]:
    """A defaultdict, without what it would make for a missing key, such as an optimiser's state."""
    return {}


def plain_number(kind: object, data: object) -> Any:
    """A numpy scalar as a Python number, such as an accuracy."""
    if not isinstance(kind, NumberType) or not isinstance(data, bytes) or len(data) != kind.dtype.itemsize:
        raise pickle.UnpicklingError("it has a numpy scalar that is not a number")
    return np.frombuffer(data, kind.dtype)[0].item()


def class_alone(_: object, found: object, __: object, ___: object) -> object:
    """The class of ('module', class, file, source): see call_for_classes."""
    return found


def call_for_classes(content: bytes) -> bytes:
    """A file of torch before 1.6 in a form that weights_only=True takes, without reading its pickles as objects.

    torch.save wrote a class as a reference outside the pickle, ('module', class, file, source), and weights_only=True
    refuses any but those of tensors. Here the reference becomes a call: class_alone('module', class, file, source).
    Raises ValueError when the pickles cannot be told apart.
    """
    file, edited, kept = io.BytesIO(content), b"", 0
    words: set[int] = set()  # where the memo has the word 'module'
    start: int | None = None  # of the last tuple, when that is its first word
    for _ in range(3):  # magic number, version and machine
        list(pickletools.genops(file))
    operations: Iterator[tuple[Any, Any, Any]] = pickletools.genops(file)
    for (before, said, at), (opcode, argument, place) in pairwise(operations):
        if said == "module" and opcode.name.endswith("BINPUT"):
            words.add(argument)
        if before.name == "MARK":
            remembered = opcode.name.endswith("BINGET") and argument in words
            start = at if remembered or argument == "module" else None
        elif opcode.name == "BINPERSID" and start is not None:
            edited += content[kept:start] + b"cpublished\nclass_alone\n" + content[start:place] + pickle.REDUCE
            kept, start = place + 1, None
    return edited + content[kept:]


def read_foreign(path: Path) -> Any:
    """What a file of torch.save of any format holds, foreign objects as Inert, running nothing of it.

    Raises ValueError, with the reason in one line, when it is missing or cannot be read.
    """
    if not path.is_file():
        raise ValueError("there is no such file")
    with open(path, "rb") as file:
        legacy = file.read(len(LEGACY_START)) == LEGACY_START
    content = call_for_classes(path.read_bytes()) if legacy else b""
    known: list[Any] = [
        (plain_dict, "collections.defaultdict"),
        (dict, "builtins.dict"),
        (plain_number, "numpy.core.multiarray.scalar"),
        (plain_number, "numpy._core.multiarray.scalar"),
        (NumberType, "numpy.dtype"),
        (class_alone, "published.class_alone"),
    ]
    asked: list[str] = []
    for _ in range(MOST_CLASSES):
        try:
            with torch.serialization.safe_globals(known):
                return read_tensors(io.BytesIO(content)) if legacy else load_tensors(path)
        except AsksFor as error:
            if error.name in asked:
                raise
            asked.append(error.name)
            known.append((type(error.name.rpartition(".")[2], (Inert,), {}), error.name))
    raise ValueError(f"it asks for more than {MOST_CLASSES} classes")
