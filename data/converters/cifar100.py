"""FC100 and CIFAR-FS: two ways to split CIFAR-100 (Krizhevsky, Learning Multiple Layers of Features, 2009).

CIFAR-FS (Bertinetto et al., Meta-learning with Differentiable Closed-form Solvers, ICLR 2019) splits the 100 classes;
FC100 (Oreshkin et al., TADAM, NeurIPS 2018) splits the 20 superclasses, so that novel classes are far from base ones.
Both take all 600 images of a class, of CIFAR's train and test sets together.
"""

import io
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

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
from data.converters.safe_pickle import load_pickle
from engine.errors import UserError
from engine.files import matches_schema

PER_CLASS = 600
ARCHIVE = "cifar-100-python.tar.gz"


def convert_cifar100(source: Path, split_file: dict[str, Any]) -> Conversion:
    """CIFAR-100 split by class names, {split: [name]}, or by superclasses, {"coarse_labels": {split: [name]}}.

    `source` is cifar-100-python.tar.gz or the folder in it. It is read here and not by torchvision, which reads the
    one published archive alone, without the superclasses.
    Raises UserError when `source` does not have the layout, or a class of the split is unknown.
    """
    with open_tree(source) as tree:
        names = _load(tree, "meta", {"fine_label_names": list[str], "coarse_label_names": list[str]})
        schema = {"data": np.ndarray, "fine_labels": object, "coarse_labels": object}
        parts = {part: _load(tree, part, schema) for part in ("train", "test")}
    fine_names, coarse_names = names["fine_label_names"], names["coarse_label_names"]
    superclasses: dict[str, str] = {}
    rows = []  # class, file, pixels
    for part, content in parts.items():
        pixels = content["data"]
        fine = whole_numbers(content["fine_labels"], f"'{source}': labels of {part}", below=len(fine_names))
        coarse = whole_numbers(content["coarse_labels"], f"'{source}': labels of {part}", below=len(coarse_names))
        if pixels.dtype != np.uint8 or not pixels.shape == (len(fine), 3 * 32 * 32) == (len(coarse), 3 * 32 * 32):
            raise UserError(f"'{source}': data, fine_labels and coarse_labels of {part} do not belong together")
        superclasses |= {fine_names[i]: coarse_names[j] for i, j in zip(fine, coarse, strict=True)}
        images = enumerate(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        rows += [(fine_names[c], f"{part}_{i:05d}.png", image) for c, (i, image) in zip(fine, images, strict=True)]

    if wanted := split_file.get("coarse_labels"):
        classes = {split: [name for name in fine_names if superclasses.get(name) in wanted[split]] for split in SPLITS}
        n_classes = {split: 5 * len(wanted[split]) for split in SPLITS}
    else:
        check_split(split_file, list[str], "lists of class names")
        classes = {split: split_file[split] for split in SPLITS}
        n_classes = {split: len(classes[split]) for split in SPLITS}
    split_of_class = {name: split for split in SPLITS for name in classes[split]}
    if unknown := sorted(set(split_of_class) - set(fine_names)):
        raise UserError(f"'{source}' has no class {', '.join(unknown)}, which the split names: is it CIFAR-100?")
    items = [
        ImageItem(split_of_class[name], name, file_name, partial(np.ascontiguousarray, image))
        for name, file_name, image in rows
        if name in split_of_class
    ]
    counts = {split: dict.fromkeys(classes[split], PER_CLASS) for split in SPLITS}
    return Conversion(items, PER_CLASS * sum(n_classes.values()), n_classes, counts, {"split_file": split_file})


def download_cifar100(folder: Path) -> Path:
    """The published archive, in `folder`. Raises UserError when it cannot be downloaded or has another checksum."""
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


def _load(tree: FileTree, name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """One of the pickles, which lie side by side in a folder cifar-100-python; it has the keys of the schema."""
    found = [path for path in tree.names if PurePosixPath(path).name == name]
    if len(found) != 1:
        raise UserError(f"'{tree.path}' has {len(found)} files '{name}' instead of one: give {ARCHIVE} or its folder")
    content = load_pickle(io.BytesIO(tree.read(found[0])), f"{tree.path}: {found[0]}")
    if not isinstance(content, dict) or not matches_schema(content, schema):
        raise UserError(f"'{tree.path}': {name} is no dictionary of {', '.join(schema)}: is it CIFAR-100?")
    return content


def _converter(name: str) -> Converter:
    flags = {
        "split_file": published_split(name),
        "source": {"type": Path, "help": f"{ARCHIVE} or its folder; default: download it"},
    }
    return Converter(convert_cifar100, "from CIFAR-100, downloaded unless given", flags, download_cifar100)


FC100, CIFAR_FS = _converter("FC100"), _converter("CIFAR-FS")
