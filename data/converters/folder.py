"""folder: anyone's own images, as a tree of class/image, split by lists of classes or at random."""

import argparse
import contextlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.converters.converter import SOURCE, SPLIT_FILE, SPLITS, Conversion, Converter, ImageItem, check_split
from data.decode import IMAGE_SUFFIXES, regular_bytes
from data.listing import list_folder
from engine.errors import UserError


def convert_folder(
    source: Path, split_file: dict[str, list[str]] | None, name: str | None, split: list[float], seed: int
) -> Conversion:
    """The images `source/<class>/<image>`, split by split_file, {split: [class]}, or at random by fractions `split`.

    Hidden files, and files that are no images by their suffix, are left out; the latter are named aloud.
    Raises UserError when `source` is no such tree or lacks a listed class.
    """
    if not source.is_dir():
        raise UserError(f"--source '{source}' is not a folder: expected a folder of class/image")
    if split_file:
        check_split(split_file, list[str] | dict[str, Any], "lists of class names")
    class_names, paths, labels = list_folder(source)
    images: dict[str, list[Path]] = {name: [] for name in class_names}
    for path, label in zip(paths, labels, strict=True):
        images[class_names[label]].append(path)
    files = [file for name in class_names for file in (source / name).iterdir() if not file.name.startswith(".")]
    others = Counter(file.suffix or file.name for file in files if file.suffix.lower() not in IMAGE_SUFFIXES)
    if others:
        print("left out, not images: " + ", ".join(f"{n} {suffix}" for suffix, n in sorted(others.items())))
    class_lists = split_file or split_at_random(class_names, split, seed)
    classes = [(part, class_name) for part in SPLITS for class_name in class_lists[part]]
    absent = [class_name for _, class_name in classes if class_name not in images]
    if absent:
        raise UserError(f"--source '{source}' has no folder for the listed classes {', '.join(map(repr, absent))}")

    items = [
        ImageItem(part, class_name, file_name, partial(regular_bytes, file))
        for part, class_name in classes
        for file_name, file in _named_apart(images[class_name]).items()
    ]
    n_classes = {part: len(class_lists[part]) for part in SPLITS}
    settings: dict[str, object] = {"split_file": split_file}
    if not split_file:  # with a class more or less the others are dealt otherwise: what was dealt is recorded
        settings = {"split": split, "seed": seed, "classes": class_lists}
    return Conversion(items, len(items), n_classes, settings=settings, title=name or source.resolve().name)


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
    parts = shuffled[:n_base], shuffled[n_base : n_base + n_val], shuffled[n_base + n_val :]
    return {split: sorted(part) for split, part in zip(SPLITS, parts, strict=True)}


def _named_apart(files: list[Path]) -> dict[str, Path]:
    """File names to write: `a.jpg` beside `a.png` becomes `a_jpg.jpg`, because resized images all end in .png."""
    stems = Counter(file.stem for file in files)
    return {
        file.name if stems[file.stem] == 1 else f"{file.stem}_{file.suffix[1:]}{file.suffix}": file for file in files
    }


def _fractions(text: str) -> list[float]:
    """The flag --split: three shares of the classes. Raises ArgumentTypeError when they are not of sum 1."""
    with contextlib.suppress(ValueError):
        fractions = [float(part) for part in text.split(",")]
        if len(fractions) == 3 and min(fractions) > 0 and abs(sum(fractions) - 1) <= 1e-6:  # of which nan is neither
            return fractions
    raise argparse.ArgumentTypeError(f"'{text}' is not three fractions of sum 1, such as 0.64,0.16,0.2")


CONVERTER = Converter(
    convert_folder,
    "from your own class/image folders",
    {
        "source": SOURCE,
        "split_file": SPLIT_FILE,
        "name": {"metavar": "TITLE", "help": "what to call the benchmark; default: the source folder's name"},
        "split": {
            "type": _fractions,
            "default": [0.64, 0.16, 0.2],
            "help": "shares of classes: 0.64,0.16,0.2 by default",
        },
        "seed": {"type": int, "default": 0, "help": "which classes --split deals to which split"},
    },
)
