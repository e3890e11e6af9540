"""An optional library of C++ functions for CPUs. `python -m models.native` compiles it; nothing is compiled unasked.

Its file is named by a hash of the source and the processor: another version or another machine does not load it.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import UserError
from engine.files import atomic_file
from engine.precision import CPUINFO

SOURCE = Path(__file__).resolve().parent.parent / "models" / "pooled_norm.cpp"
FOLDER = SOURCE.parent / "_native"
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
# OpenMP is not linked, so that its threads are those of the library that PyTorch has loaded.
FLAGS += ["-Xpreprocessor", "-fopenmp"]


def library_path() -> Path:
    """Where the library of this source, these flags and this processor is once it is built."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    digest = hashlib.sha256(f"{FLAGS} {platform.machine()} {processor}".encode() + SOURCE.read_bytes())
    return FOLDER / f"{SOURCE.stem}-{digest.hexdigest()[:16]}.so"


def build() -> Path:
    """Compile the library with $CXX, or c++, g++ or clang++. Raises UserError when there is none, or it fails."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise UserError(f"no C++ compiler ({', '.join(names)}): install g++, or name one in CXX; nothing needs it")
    path = library_path()
    with atomic_file(path) as temporary:
        done = subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(temporary)], capture_output=True, text=True)
        try:
            if done.returncode:
                raise OSError(done.stderr)
            ctypes.CDLL(str(temporary))
        except OSError as error:
            reason = next((line for line in str(error).splitlines() if "error" in line or "undefined" in line), error)
            raise UserError(f"{compiler} does not make the library ({reason}): name another in CXX") from error
    library.cache_clear()
    return path


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library where it has been built; the answer holds for the whole process.

    Raises UserError when it cannot be loaded.
    """
    if not SOURCE.is_file():  # where the Python files alone were copied
        return None
    path = library_path()
    try:
        return ctypes.CDLL(str(path)) if path.is_file() else None
    except OSError as error:
        raise UserError(f"{path} cannot be loaded ({error}): python -m models.native, or remove it") from error


def version() -> str | None:
    """The name of the library in use, None without one."""
    return None if library() is None else library_path().stem


def call(function: str, x: Tensor, *tensors: Tensor) -> None:
    """A function of the library on maps of the shape and type of x (b, c, h, w), and on tensors that it reads or fills.

    All are on the CPU, those of four dimensions in channels-last memory.
    """
    b, c, h, w = x.shape
    maps = (ctypes.c_int64 * 6)(x.dtype == torch.bfloat16, torch.get_num_threads(), b, h, w, c)
    getattr(library(), function)(maps, *(ctypes.c_void_p(t.data_ptr()) for t in tensors))
