"""Every random draw of the project comes from a generator made here, from --seed and the name of its purpose."""

import contextlib
import zlib
from collections.abc import Iterator

import numpy as np
import torch

# All keys of make_generator and seeded: what is drawn, and the numbers that follow the key.
KEYS = {
    "backbone": "initial weights of the backbone, of stages 1 and 2 and of predict.py",
    "base head": "initial weights of stage 1's head on the base classes",
    "meta-learner": "initial weights of stage 2's meta-learner",
    "base training": "order and augmentation of stage 1's images: epoch",
    "episodic training": "augmentation of stage 2's images: epoch, episode of the epoch",
    "dropout": "dropout: epoch, step and, but for the first, rank in stage 1; epoch, episode in stage 2; episode in 3",
    "episode": "classes, support and query of an episode, after the name of the split: episode",
    "head": "initial weights of the head on a support set: episode; 0 for a user's support, fold for its confidence",
    "critic": "initial weights of the critic of adversarial alignment: episode",
    "related draws": "related samples of every iteration of alignment: episode",
}


def make_generator(seed: int, *keys: str | int) -> torch.Generator:
    """A CPU generator that depends on (seed, keys) alone, e.g. `make_generator(0, "head", episode)`; keys: see KEYS.

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
