"""folder: anyone's own images, as a tree of class/image, split by lists of classes or at random."""

import argparse
import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.converters.archives import is_archive, open_tree
from data.converters.converter import IMAGE_ROOT, SOURCE, SPLIT_FILE, SPLITS, Conversion, Converter, check_split
from data.converters.lists import UNSPLIT, Images, Listed, Row, items_of, name_apart, read_lists
from data.decode import regular_bytes
from data.listing import FEW_CLASSES, list_folder, shared_by, split_folders
from engine.errors import UserError


def convert_folder(
    source: Path,
    split_file: dict[str, list[str]] | None,
    name: str | None,
    split: list[float],
    seed: int,
    image_root: Path | None = None,
) -> Conversion:
    """The images of lists or of `source/<class>/<image>`, split by split_file, {split: [class]}, or at random.

    Lists, and folders train, val and test of classes, may have splits of their own; where such folders share classes,
    these are joined. Raises UserError when `source` is none of these or lacks a class of the split_file.
    """
    if split_file:
        check_split(split_file, list[str] | dict[str, Any], "lists of class names")
    with contextlib.ExitStack() as stack:
        lists: Listed = {}
        if source.is_dir() or is_archive(source):
            tree = stack.enter_context(open_tree(source))
            lists = read_lists(tree, stack.enter_context(open_tree(image_root)) if image_root else tree)
        if lists and UNSPLIT not in lists:
            if split_file:
                raise UserError(f"'{source}' has lists of its own splits: leave out --split_file")
            listed = lists
        else:
            images, own = (lists[UNSPLIT], None) if lists else read_folders(source)
            dealt = split_file or own or split_at_random(source, sorted(images), split, seed)
            if absent := [name for part in SPLITS for name in dealt[part] if name not in images]:
                raise UserError(f"--source '{source}' has no images of the classes {', '.join(map(repr, absent))}")
            listed = {part: {name: images[name] for name in dealt[part]} for part in SPLITS}
        items = items_of(listed)
        n_classes = {part: len(classes) for part, classes in listed.items()}
        counts: dict[str, dict[str, int]] = {}
        settings: dict[str, object] = {"split_file": split_file}
        if lists:
            counts = {part: {name: len(files) for name, files in classes.items()} for part, classes in listed.items()}
            settings = {"lists": {"images": [item.name for item in items]}}
        elif not split_file:  # with a class more or less the others are dealt otherwise: what was dealt is recorded
            settings = {"split": split, "seed": seed, "classes": dealt}
        title = name or (source.resolve().name if source.is_dir() else source.stem)
        return Conversion(items, len(items), n_classes, counts, settings, title, stack.pop_all())


def read_folders(source: Path) -> tuple[Images, dict[str, list[str]] | None]:
    """{class: {file name: content}} of class folders, and the classes of train, val and test if they are in these.

    Raises UserError when there are no class folders, or only in two of train, val and test.
    """
    if not source.is_dir():
        raise UserError(f"--source '{source}' is not a folder of class/image, nor an archive of images with lists")
    folders = split_folders(source)
    listings = [list_folder(place) for place in (folders.values() if len(folders) > 1 else [source])]
    rows: list[Row] = [
        (class_names[label], path.as_posix(), partial(regular_bytes, path))
        for class_names, paths, labels in listings
        for path, label in zip(paths, labels, strict=True)
    ]
    images = name_apart(rows, source)
    if len(listings) < 2:
        return images, None
    names = " and ".join(path.name for path in folders.values())
    if shared_by(folders):
        print(f"note: {names} share classes: the images of a class are joined, and the classes dealt by --split")
        return images, None
    if len(listings) < 3:
        raise UserError(f"--source '{source}' has folders {names} of classes: make the third of train, val and test")
    return images, {split: class_names for split, (class_names, _, _) in zip(folders, listings, strict=True)}


def split_at_random(source: Path, class_names: list[str], fractions: list[float], seed: int) -> dict[str, list[str]]:
    """Deal the classes out to base, val and novel by `fractions` (three, of sum 1), at least one class to each.

    Raises UserError when there are too few classes.
    """
    if len(class_names) < 3:
        raise UserError(f"--source '{source}': {FEW_CLASSES.format(n=len(class_names), support=source)}")
    n_val, n_novel = (max(1, round(fraction * len(class_names))) for fraction in fractions[1:])
    n_base = len(class_names) - n_val - n_novel
    if n_base < 1:
        raise UserError(f"{len(class_names)} classes split by {fractions} leave none for base: give other fractions")
    order = torch.randperm(len(class_names), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [class_names[i] for i in order]
    parts = shuffled[:n_base], shuffled[n_base : n_base + n_val], shuffled[n_base + n_val :]
    return {split: sorted(part) for split, part in zip(SPLITS, parts, strict=True)}


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
        "split": {"type": _fractions, "default": "0.64,0.16,0.2", "help": "shares of classes: %(default)s by default"},
        "seed": {"type": int, "default": 0, "help": "which classes --split deals to which split"},
    },
)
