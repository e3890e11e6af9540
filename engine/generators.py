"""Every random draw of the project comes from a generator made here, from --seed and the name of its purpose."""

import contextlib
import zlib
from collections.abc import Iterator

import numpy as np
import torch


def make_generator(seed: int, *keys: str | int) -> torch.Generator:
    """A CPU generator that depends on (seed, keys) alone, e.g. `make_generator(0, "align", episode)`.

    Draws are made on the CPU and moved, so that every device sees the same numbers.
    """
    words = [seed] + [zlib.crc32(key.encode()) if isinstance(key, str) else key for key in keys]
    state = np.random.SeedSequence(words).generate_state(2, np.uint32)
    return torch.Generator().manual_seed((int(state[0]) << 31) ^ int(state[1]))


@contextlib.contextmanager
def seeded(seed: int, *keys: str | int) -> Iterator[None]:
    """Inside, PyTorch's own initialisers and dropout draw from (seed, keys); outside, the generator is as it was.

    That generator is the CPU's; those of other devices, from which nothing here draws outside, stay seeded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(make_generator(seed, *keys).initial_seed())
        yield
