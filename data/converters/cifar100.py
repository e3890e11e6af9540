"""FC100 and CIFAR-FS: two ways to split CIFAR-100 (Krizhevsky, Learning Multiple Layers of Features, 2009).

CIFAR-FS (Bertinetto et al., Meta-learning with Differentiable Closed-form Solvers, ICLR 2019) splits the 100 classes;
FC100 (Oreshkin et al., TADAM, NeurIPS 2018) splits the 20 superclasses, so that novel classes are far from base ones.
Both take all 600 images of a class, of CIFAR's train and test sets together.
"""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.converters.archives import FileTree, open_tree
from data.converters.converter import (
    SPLITS,
    Conversion,
    Converter,
    ImageItem,
    check_split,
    published_split,
    whole_numbers,
)
from data.converters.safe_pickle import StoredArray, load_pickle
from engine.errors import UserError
from engine.files import matches_schema

PER_CLASS = 600
ARCHIVE = "cifar-100-python.tar.gz"


def convert_cifar100(source: Path, split_file: dict[str, Any]) -> Conversion:
    """CIFAR-100 split by class names, {split: [name]}, or by superclasses, {"coarse_labels": {split: [name]}}.

    `source` is cifar-100-python.tar.gz or the folder in it.
    Raises UserError when `source` does not have the layout, or a class of the split is unknown.
    """
    # torchvision downloads the archive and checks its md5, but reads it with the standard unpickler, and by md5 only
    # the one published archive: so the reading, which must also be safe for archives from elsewhere, is ours.
    with open_tree(source) as tree:
        parts = {part: _load(tree, part, "data", "fine_labels", "coarse_labels") for part in ("train", "test")}
        fine_names, coarse_names = _load(tree, "meta", "fine_label_names", "coarse_label_names")
    if not matches_schema(fine_names, list[str]) or not matches_schema(coarse_names, list[str]):
        raise UserError(f"'{source}': fine_label_names and coarse_label_names are not lists of names")
    coarse_of_fine: dict[str, str] = {}
    images: list[tuple[str, str, Callable[[], NDArray[np.uint8]]]] = []  # class, file, what reads it
    for part, (pixels, *labels) in parts.items():
        fine, coarse = (whole_numbers(each, f"'{source}': labels of {part}") for each in labels)
        if (
            not isinstance(pixels, StoredArray)
            or pixels.array.dtype != np.uint8
            or not pixels.array.shape == (len(fine), 3 * 32 * 32) == (len(coarse), 3 * 32 * 32)
            or max(fine, default=0) >= len(fine_names)
            or max(coarse, default=0) >= len(coarse_names)
        ):
            raise UserError(f"'{source}': data, fine_labels and coarse_labels of {part} do not belong together")
        coarse_of_fine |= {fine_names[i]: coarse_names[j] for i, j in zip(fine, coarse, strict=True)}
        rows = zip(fine, pixels.array, strict=True)
        images += [(fine_names[c], f"{part}_{i:05d}.png", partial(_image, row)) for i, (c, row) in enumerate(rows)]

    classes, n_classes = _classes_of_splits(split_file, fine_names, coarse_of_fine)
    unknown = sorted(set().union(*classes.values()) - set(fine_names))
    if unknown:
        raise UserError(f"'{source}' has no class {', '.join(unknown)}, which the split names: is it CIFAR-100?")
    split_of_class = {name: split for split in SPLITS for name in classes[split]}
    items = [ImageItem(split_of_class[image[0]], *image) for image in images if image[0] in split_of_class]
    counts = {split: dict.fromkeys(classes[split], PER_CLASS) for split in SPLITS}
    return Conversion(items, len(items), n_classes, class_counts=counts, settings={"split_file": split_file})


def _classes_of_splits(
    split_file: dict[str, Any], fine_names: list[str], coarse_of_fine: dict[str, str]
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """The classes of each split, and how many there should be: a superclass has five."""
    if "coarse_labels" not in split_file:
        check_split(split_file, list[str], "lists of class names")
        return {split: split_file[split] for split in SPLITS}, {split: len(split_file[split]) for split in SPLITS}
    wanted = split_file["coarse_labels"]
    classes = {split: [name for name in fine_names if coarse_of_fine.get(name) in wanted[split]] for split in SPLITS}
    return classes, {split: 5 * len(wanted[split]) for split in SPLITS}


def download_cifar100(folder: Path) -> Path:
    """The published archive, in `folder`. Raises UserError when it cannot be downloaded."""
    # Imported here, because it takes seconds and 150 MB, and only a download needs it.
    from torchvision.datasets import CIFAR100
    from torchvision.datasets.utils import download_url

    try:
        download_url(CIFAR100.url, str(folder), ARCHIVE, CIFAR100.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"CIFAR-100 cannot be downloaded ({error}): get {ARCHIVE} from {CIFAR100.url} and give it as --source"
        ) from None
    return folder / ARCHIVE


def _load(tree: FileTree, name: str, *keys: str) -> list[Any]:
    """The entries `keys` of one of the pickles, which lie side by side in a folder cifar-100-python."""
    found = [path for path in tree.names if PurePosixPath(path).name == name]
    if len(found) != 1:
        raise UserError(f"'{tree.path}' has {len(found)} files '{name}' instead of one: give {ARCHIVE} or its folder")
    content = load_pickle(io.BytesIO(tree.read(found[0])), f"{tree.path}: {found[0]}")
    if not isinstance(content, dict):
        raise UserError(f"'{tree.path}': {found[0]} holds a {type(content).__name__} instead of a dictionary")
    for key in keys:
        if key not in content:
            raise UserError(
                f"'{tree.path}': {name} has no key '{key}', only {', '.join(map(repr, content))}: is it CIFAR-100?"
            )
    return [content[key] for key in keys]


def _image(row: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image (32, 32, 3) from its red, green and blue planes, one after the other."""
    return np.ascontiguousarray(row.reshape(3, 32, 32).transpose(1, 2, 0))


def _converter(name: str) -> Converter:
    flags = {
        "split_file": published_split(name),
        "source": {"type": Path, "help": "cifar-100-python.tar.gz or its folder; default: download it"},
    }
    return Converter(convert_cifar100, "from CIFAR-100, downloaded unless given", flags, download_cifar100)


FC100, CIFAR_FS = _converter("FC100"), _converter("CIFAR-FS")
