"""folder: anyone's own images, as a tree of class/image, split by lists of classes or at random."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from data.converters.writing import SPLITS, Conversion, Expected, ImageItem
from data.image_cache import IMAGE_SUFFIXES
from engine.errors import UserError


@contextmanager
def convert_folder(
    source: Path, class_lists: dict[str, list[str]] | None, fractions: list[float], seed: int
) -> Iterator[Conversion]:
    """The images `source/<class>/<image>`, split by class_lists, {split: [class]}, or at random by `fractions`.

    Hidden files, and files that are no images by their suffix, are left out; the latter are named aloud.
    Raises UserError when `source` is no such tree or lacks a listed class.
    """
    if not source.is_dir():
        raise UserError(f"--source '{source}' is not a folder: expected a folder of class/image")
    images: dict[str, list[Path]] = {}
    others: Counter[str] = Counter()
    for folder in sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        images[folder.name] = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        others.update(file.suffix or file.name for file in files if file.suffix.lower() not in IMAGE_SUFFIXES)
        if not images[folder.name]:
            raise UserError(f"'{folder}' holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}): fill or remove it")
    if not images:
        raise UserError(f"--source '{source}' holds no class folders: expected a folder of class/image")
    if others:
        print("left out, not images: " + ", ".join(f"{n} {suffix}" for suffix, n in sorted(others.items())))
    if class_lists is None:
        class_lists = split_at_random(list(images), fractions, seed)
    absent = [name for split in SPLITS for name in class_lists[split] if name not in images]
    if absent:
        raise UserError(f"--source '{source}' has no folder for the listed classes {', '.join(map(repr, absent))}")

    items = (
        ImageItem(split, name, file_name, file.read_bytes)
        for split in SPLITS
        for name in class_lists[split]
        for file_name, file in _named_apart(images[name]).items()
    )
    n_images = sum(len(images[name]) for split in SPLITS for name in class_lists[split])
    yield Conversion(items, n_images, Expected({split: len(class_lists[split]) for split in SPLITS}))


def split_at_random(class_names: list[str], fractions: list[float], seed: int) -> dict[str, list[str]]:
    """Deal the classes out to base, val and novel by `fractions` (three, of sum 1), at least one class to each.

    Raises UserError when there are too few classes.
    """
    n_val, n_novel = (max(1, round(fraction * len(class_names))) for fraction in fractions[1:])
    n_base = len(class_names) - n_val - n_novel
    if n_base < 1:
        raise UserError(
            f"{len(class_names)} classes cannot be split into base, val and novel by {fractions}: "
            f"each needs one class at least, and with {n_val} val and {n_novel} novel classes base would get {n_base}"
        )
    order = torch.randperm(len(class_names), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [class_names[i] for i in order]
    return {
        "base": sorted(shuffled[:n_base]),
        "val": sorted(shuffled[n_base : n_base + n_val]),
        "novel": sorted(shuffled[n_base + n_val :]),
    }


def _named_apart(files: list[Path]) -> dict[str, Path]:
    """File names to write: `a.jpg` beside `a.png` becomes `a_jpg.jpg`, because resized images all end in .png."""
    stems = Counter(file.stem for file in files)
    return {
        file.name if stems[file.stem] == 1 else f"{file.stem}_{file.suffix[1:]}{file.suffix}": file for file in files
    }
