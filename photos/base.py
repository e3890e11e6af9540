"""Any folder as a base set: the base split of a benchmark, or simply folders of images, one a class.

What it shares with a user's own images is left out: a class that the user has too would be aligned with itself.
"""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.benchmarks import DataOptions, Split, list_split, load_listed
from data.decode import image_bytes
from data.listing import list_folder
from engine.errors import UserError
from engine.files import load_tensors, matches_schema, save_atomically


def load_base(folder: Path, options: DataOptions) -> tuple[Split, list[Path]]:
    """The base split of a benchmark `folder`, or its class folders as one, and the paths of the images.

    Raises UserError when the folder is neither.
    """
    root = Path(os.path.abspath(folder))
    options = replace(options, benchmarks_dir=root.parent)
    if root.name == "glyphs" or is_benchmark(root, "base"):
        listing, split = list_split(options, root.name, "base"), "base"
    elif root.is_dir() and any(p.is_dir() and p.name[0] != "." for p in root.iterdir()):
        listing, split = list_folder(root), "folder"
    else:
        raise UserError(
            f"--base {folder} is neither a benchmark ({root}/base/<class>/<image> or {root}/base.json) nor a folder of "
            f"classes ({root}/<class>/<image>): give another folder, or none"
        )
    return load_listed(options, root.name, split, listing), listing[1]


def is_benchmark(root: Path, split: str) -> bool:
    """Whether a folder holds this split of a benchmark."""
    return (root / split).is_dir() or (root / f"{split}.json").is_file()


def content_hash(path: Path) -> int:
    """64 bits of a hash of an image file's bytes. Raises UserError when it cannot be read."""
    return int.from_bytes(hashlib.blake2b(image_bytes(path), digest_size=8).digest(), "little", signed=True)


def base_hashes(paths: Sequence[Path], split: Split, cache_dir: Path) -> np.ndarray:
    """The content_hash (N,) of each image of a split, kept in cache_dir under the split's fingerprint."""
    path = cache_dir / f"hashes_{split.benchmark}_{split.split}_{split.fingerprint}.pt"
    with contextlib.suppress(OSError, ValueError):  # not there or damaged: made below
        kept = load_tensors(path, "cpu")
        if matches_schema(kept, Tensor) and kept.shape == (len(paths),) and kept.dtype == torch.int64:
            return np.asarray(kept)
    hashes = np.fromiter(map(content_hash, paths), np.int64, len(paths))
    save_atomically(path, torch.from_numpy(hashes))
    return hashes


def shared_classes(
    base: Split, paths: Sequence[Path], cache_dir: Path, class_names: Sequence[str], images: Sequence[Path]
) -> dict[int, str]:
    """The base classes that are the user's as well, and why: one of the class_names, or it holds one of the images."""
    names = {name.casefold() for name in class_names}
    why = {c: "is a class of the support" for c, name in enumerate(base.class_names) if name.casefold() in names}
    theirs = np.fromiter(map(content_hash, images), np.int64, len(images))
    same = torch.from_numpy(np.isin(base_hashes(paths, base, cache_dir), theirs))
    for c, n in enumerate(torch.bincount(base.labels[same], minlength=len(base.class_names)).tolist()):
        if n and c not in why:
            why[c] = f"holds {n} of the support and query images"
    return why


def without_classes(split: Split, left_out: Sequence[int]) -> Split:
    """The split with its images, where those of some classes do not count, and their names are gone."""
    kept = [c for c in range(len(split.class_names)) if c not in set(left_out)]
    new_label = torch.full((len(split.class_names),), len(kept)).index_put(
        (torch.tensor(kept).long(),), torch.arange(len(kept))
    )
    return replace(split, class_names=[split.class_names[c] for c in kept], labels=new_label[split.labels])
