"""Any folder as a base set: the base split of a benchmark, or simply folders of images, one per class.

What it shares with a user's own images is left out: a class that the user has too would be aligned with itself.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from data.benchmarks import DataOptions, Split, list_split, load_listed
from data.decode import image_bytes
from data.listing import list_folder, split_folders, subfolders
from engine.errors import UserError


def load_base(folder: Path, options: DataOptions) -> tuple[Split, list[Path]]:
    """The base split of a benchmark `folder`, or its class folders as one, and the paths of the images.

    Raises UserError when the folder is neither.
    """
    root = Path(os.path.abspath(folder))
    if root.name == "glyphs" or "base" in split_folders(root) or (root / "base.json").is_file():
        listing, split = list_split(options, root.name, "base"), "base"
    elif subfolders(root):
        listing, split = list_folder(root), "folder"
    else:
        raise UserError(
            f"--base {folder} is neither a benchmark ({root}/base/<class>/<image> or {root}/base.json) nor a folder of "
            f"classes ({root}/<class>/<image>): give another folder, or none"
        )
    return load_listed(options, root.name, split, listing), listing[1]


def content_hash(path: Path) -> bytes:
    """A hash of an image file's bytes. Raises UserError when it cannot be read."""
    return hashlib.blake2b(image_bytes(path), digest_size=16).digest()


def shared_classes(
    base: Split, paths: Sequence[Path], class_names: Sequence[str], images: Sequence[Path]
) -> dict[int, str]:
    """The base classes that are the user's as well, and why: one of the class_names, or it holds one of the images.

    Images are compared by content; only those of the base set that have the size of one of the images are read.
    """
    names = {name.casefold() for name in class_names}
    why = {c: "is a class of the support" for c, name in enumerate(base.class_names) if name.casefold() in names}
    sizes, contents = {path.stat().st_size for path in images}, set(map(content_hash, images))
    labelled = zip(paths, base.labels.tolist(), strict=True)
    others = ((path, c) for path, c in labelled if c not in why and path.stat().st_size in sizes)
    same = Counter(c for path, c in others if content_hash(path) in contents)
    return why | {c: f"holds {n} of the support and query images" for c, n in sorted(same.items())}


def without_classes(split: Split, left_out: Sequence[int]) -> Split:
    """The split with all images, of which those of some classes do not count, and without the names of these."""
    kept = [c for c in range(len(split.class_names)) if c not in left_out]
    new_label = torch.full((len(split.class_names),), len(kept))
    new_label[kept] = torch.arange(len(kept))
    return replace(split, class_names=[split.class_names[c] for c in kept], labels=new_label[split.labels])


def base_without(
    folder: Path, options: DataOptions, class_names: Sequence[str], images: Sequence[Path]
) -> tuple[Split, list[str]]:
    """The base set of a folder without the classes that it shares with the user, and a note on each of these.

    Raises UserError when fewer classes are left than the user has.
    """
    split, paths = load_base(folder, options)
    shared = shared_classes(split, paths, class_names, images)
    notes = [f"base class {split.class_names[c]!r} {why}: it is left out" for c, why in shared.items()]
    split = without_classes(split, list(shared))
    if len(split.class_names) < len(class_names):
        raise UserError(
            f"--base {folder} has {len(split.class_names)} classes that are not the user's, fewer than the "
            f"{len(class_names)} of the support: give a larger base set, or none"
        )
    return split, notes
