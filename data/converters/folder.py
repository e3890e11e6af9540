"""folder: anyone's own images, as a tree of class/image, split by lists of classes or at random."""

import argparse
import contextlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.converters.archives import is_archive, open_tree
from data.converters.converter import (
    IMAGE_ROOT,
    SOURCE,
    SPLIT_FILE,
    SPLITS,
    Conversion,
    Converter,
    ImageItem,
    check_split,
)
from data.converters.lists import UNSPLIT, Listed, read_lists
from data.decode import regular_bytes
from data.listing import FEW_CLASSES, Listing, join_listings, list_folder, plain_names, shared_by, split_folders
from engine.errors import UserError


def convert_folder(
    source: Path,
    split_file: dict[str, list[str]] | None,
    name: str | None,
    split: list[float],
    seed: int,
    image_root: Path | None = None,
) -> Conversion:
    """The images `source/<class>/<image>`, split by split_file, {split: [class]}, or at random by fractions `split`.

    Folders train, val and test of classes in `source` are the splits; where they share classes, these are joined.
    Raises UserError when `source` is no such tree or lacks a listed class.
    """
    with contextlib.ExitStack() as stack:
        if source.is_dir() or is_archive(source):
            tree = stack.enter_context(open_tree(source))
            listed = read_lists(tree, stack.enter_context(open_tree(image_root)) if image_root else tree)
            if listed:
                if UNSPLIT in listed:
                    if split_file:
                        check_split(split_file, list[str] | dict[str, Any], "lists of class names")
                    dealt = split_file or split_at_random(source, sorted(listed[UNSPLIT]), split, seed)
                    listed = {part: {name: listed[UNSPLIT].get(name, {}) for name in dealt[part]} for part in SPLITS}
                elif split_file:
                    raise UserError(f"'{source}' has lists of its own splits: leave out --split_file")
                return _of_lists(
                    listed, name or (source.resolve().name if source.is_dir() else source.stem), stack.pop_all()
                )
    if not source.is_dir():
        raise UserError(f"--source '{source}' is not a folder of class/image, nor an archive of images with lists")
    if split_file:
        check_split(split_file, list[str] | dict[str, Any], "lists of class names")
    folders = split_folders(source)
    listings = [list_folder(place) for place in (folders.values() if len(folders) > 1 else [source])]
    joined = join_listings(listings)
    images = plain_names(joined)
    settings: dict[str, object] = {"split_file": split_file}
    if not split_file:  # with a class more or less the others are dealt otherwise: what was dealt is recorded
        class_lists = lists_of_folders(source, folders, listings) or split_at_random(source, joined[0], split, seed)
        settings = {"split": split, "seed": seed, "classes": class_lists}
    class_lists = split_file or class_lists
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
    return Conversion(items, len(items), n_classes, settings=settings, title=name or source.resolve().name)


def lists_of_folders(source: Path, folders: dict[str, Path], listings: list[Listing]) -> dict[str, list[str]] | None:
    """The classes of folders train, val and test; None where there are none, or they share classes.

    Raises UserError when one of the three is missing.
    """
    if len(listings) < 2:
        return None
    names = " and ".join(path.name for path in folders.values())
    if shared_by(folders):
        print(f"note: {names} share classes: the images of a class are joined, and the classes dealt by --split")
        return None
    if len(listings) < 3:
        raise UserError(f"--source '{source}' has folders {names} of classes: make the third of train, val and test")
    return {split: class_names for split, (class_names, _, _) in zip(folders, listings, strict=True)}


def _of_lists(listed: Listed, title: str, opened: contextlib.ExitStack) -> Conversion:
    """The conversion of images that lists name, which are read from what is `opened`."""
    counts = {split: {name: len(files) for name, files in classes.items()} for split, classes in listed.items()}
    items = [
        ImageItem(split, class_name, file_name, read)
        for split, classes in listed.items()
        for class_name, files in classes.items()
        for file_name, read in files.items()
    ]
    n_classes = {split: len(classes) for split, classes in listed.items()}
    settings: dict[str, object] = {"lists": {"images": [item.name for item in items]}}
    return Conversion(items, len(items), n_classes, counts, settings, title, opened)


def split_at_random(source: Path, class_names: list[str], fractions: list[float], seed: int) -> dict[str, list[str]]:
    """Deal the classes out to base, val and novel by `fractions` (three, of sum 1), at least one class to each.

    Raises UserError when there are too few classes.
    """
    if len(class_names) < 3:
        raise UserError(f"--source '{source}': {FEW_CLASSES.format(n=len(class_names), support=source)}")
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


def _named_apart(files: dict[str, Path]) -> dict[str, Path]:
    """File names to write: `a.jpg` beside `a.png` becomes `a_jpg.jpg`, because resized images all end in .png."""
    stems = Counter(Path(name).stem for name in files)
    return {
        name if stems[Path(name).stem] == 1 else f"{Path(name).stem}_{file.suffix[1:]}{file.suffix}": file
        for name, file in files.items()
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
    "from your own class/image folders, or images with lists",
    {
        "source": SOURCE,
        "image_root": IMAGE_ROOT,
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
