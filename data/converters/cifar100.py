"""FC100 and CIFAR-FS: two ways to split CIFAR-100 (Krizhevsky, Learning Multiple Layers of Features, 2009).

CIFAR-FS (Bertinetto et al., Meta-learning with Differentiable Closed-form Solvers, ICLR 2019) splits the 100 classes;
FC100 (Oreshkin et al., TADAM, NeurIPS 2018) splits the 20 superclasses, so that novel classes are far from base ones.
Both take all 600 images of a class, of CIFAR's train and test sets together.
"""

import io
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data.converters.archives import FileTree, open_tree
from data.converters.converter import SPLIT_FILES, SPLITS, Conversion, Converter, Read, check_split, published_split
from data.converters.lists import Images, Row, items_of, name_apart, split_pickles
from data.converters.safe_pickle import are_images, load_pickle, whole_numbers
from data.decode import IMAGE_SUFFIXES
from engine.errors import UserError
from engine.files import matches_schema, read_json

PER_CLASS = 600
ARCHIVE = "cifar-100-python.tar.gz"


def convert_cifar100(source: Path, split_file: dict[str, Any]) -> Conversion:
    """CIFAR-100 split by class names, {split: [name]}, or by superclasses, {"coarse_labels": {split: [name]}}.

    `source` is cifar-100-python.tar.gz, which torchvision reads without the superclasses; pickles of train, val and
    test; or folders of the classes; each in a folder or an archive.
    Raises UserError when it is none of them, or a class of the split is unknown.
    """
    superclasses = read_json(SPLIT_FILES / "CIFAR-100.json")
    fine_names = sorted(name for names in superclasses.values() for name in names)
    classes = _classes(split_file, superclasses)
    n_classes = {split: len(names) for split, names in classes.items()}
    with ExitStack() as stack:
        tree = stack.enter_context(open_tree(source))
        rows: list[Row] = [(PurePosixPath(name).parent.name, name, partial(tree.read, name)) for name in tree.names]
        rows = [row for row in rows if row[0] in fine_names and PurePosixPath(row[1]).suffix.lower() in IMAGE_SUFFIXES]
        if pickles := split_pickles([PurePosixPath(name).name for name in tree.names], source):
            images, classes = _read_split_pickles(tree, pickles, classes, fine_names)
        else:
            images = name_apart(rows, source) or _read_published(tree)
        items = items_of({split: {name: images.get(name, {}) for name in names} for split, names in classes.items()})
        counts = {split: dict.fromkeys(names, PER_CLASS) for split, names in classes.items()}
        n_images, opened = PER_CLASS * sum(n_classes.values()), stack.pop_all()
        return Conversion(items, n_images, n_classes, counts, {"split_file": split_file}, opened=opened)


def _classes(split_file: dict[str, Any], superclasses: dict[str, list[str]]) -> dict[str, list[str]]:
    """The names of the classes of each split, also of one that names superclasses."""
    if coarse := split_file.get("coarse_labels"):
        return {split: [c for name in coarse[split] for c in superclasses.get(name, [])] for split in SPLITS}
    check_split(split_file, list[str], "lists of class names")
    classes = {split: split_file[split] for split in SPLITS}
    if unknown := set().union(*classes.values()) - set().union(*superclasses.values()):
        raise UserError(f"the split names {', '.join(sorted(unknown))}, no class of CIFAR-100")
    return classes


def _read_published(tree: FileTree) -> Images:
    """The pickles train, test and meta of the published archive."""
    names = _load(tree, "meta", {"fine_label_names": list[str], "coarse_label_names": list[str]})["fine_label_names"]
    images: Images = {name: {} for name in names}
    for part in ("train", "test"):
        content = _load(tree, part, {"data": np.ndarray, "fine_labels": object})
        pixels = content["data"]
        fine = whole_numbers(content["fine_labels"], f"'{tree.path}': labels of {part}", below=len(names))
        if pixels.dtype != np.uint8 or pixels.shape != (len(fine), 3 * 32 * 32):
            raise UserError(f"'{tree.path}': data and fine_labels of {part} do not belong together")
        for i, image in enumerate(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)):
            images[names[fine[i]]][f"{part}_{i:05d}.png"] = partial(np.ascontiguousarray, image)
    return images


def _read_split_pickles(
    tree: FileTree, pickles: dict[str, str], classes: dict[str, list[str]], fine_names: list[str]
) -> tuple[Images, dict[str, list[str]]]:
    """MetaOptNet's pickles, which RFS has renamed: {data (n, 32, 32, 3), labels}; and what their classes are called.

    That is as in CIFAR-100 where the labels of each split are CIFAR-100's numbers of the classes of the split, from 0
    by name; else class_<label>, or <split>_<label> where splits share labels.
    """
    rows: dict[str, dict[int, dict[str, Read]]] = {}
    for split, file in pickles.items():
        content = _load(tree, file, {"data": np.ndarray, "labels": object})
        data, labels = content["data"], whole_numbers(content["labels"], f"'{tree.path}': labels of {file}")
        if not are_images(data) or len(data) != len(labels):
            raise UserError(f"'{tree.path}': data of {file} is no array (n, 32, 32, 3) of uint8, one for each label")
        if data.shape[1:3] != (32, 32):
            size = "x".join(map(str, data.shape[1:3]))
            raise UserError(f"'{tree.path}': {file} has images of {size} pixels, as miniImagenet has, not CIFAR-100")
        rows[split] = {label: {} for label in sorted(set(labels))}
        for i, label in enumerate(labels):
            rows[split][label][f"{i:05d}.png"] = partial(data.__getitem__, i)
    n_found, n_wanted = ([len(of[split]) for split in SPLITS] for of in (rows, classes))
    if any(found > wanted for found, wanted in zip(n_found, n_wanted, strict=True)):
        kind = "CIFAR-FS" if n_found == [64, 16, 20] else "FC100" if n_found == [60, 20, 20] else "another benchmark"
        raise UserError(f"'{tree.path}' has {n_found} classes of base, val and novel, not {n_wanted}: it is {kind}")
    names = {split: {n: fine_names[n] for n in own if n < len(fine_names)} for split, own in rows.items()}
    if any(sorted(names[split].values()) != sorted(classes[split]) for split in SPLITS):
        shared = len(set().union(*rows.values())) < sum(n_found)
        names = {split: {n: f"{split if shared else 'class'}_{n:02d}" for n in own} for split, own in rows.items()}
        print("note: the labels are not CIFAR-100's numbers of these classes, which are called by their labels")
    images = {names[split][label]: files for split, own in rows.items() for label, files in own.items()}
    return images, {split: list(own.values()) for split, own in names.items()}


def download_cifar100(folder: Path) -> Path:
    """The published archive, in `folder`. Raises UserError when it cannot be downloaded or has another checksum."""
    # Imported here, because it takes seconds and 150 MB, and only a download needs it.
    from torchvision.datasets import CIFAR100
    from torchvision.datasets.utils import download_url

    try:
        download_url(CIFAR100.url, str(folder), ARCHIVE, CIFAR100.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise UserError(f"no download ({error}): give {ARCHIVE} of {CIFAR100.url} as --source") from None
    return folder / ARCHIVE


def _load(tree: FileTree, name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """One of the pickles, which lie side by side in a folder cifar-100-python; it has the keys of the schema."""
    found = [path for path in tree.names if PurePosixPath(path).name == name]
    if len(found) != 1:
        raise UserError(f"'{tree.path}' has {len(found)} files '{name}', not one: give {ARCHIVE} or class folders")
    content = load_pickle(io.BytesIO(tree.read(found[0])), f"{tree.path}: {found[0]}")
    if not isinstance(content, dict) or not matches_schema(content, schema):
        raise UserError(f"'{tree.path}': {name} is no dictionary of {', '.join(schema)}: is it CIFAR-100?")
    return content


def _converter(name: str) -> Converter:
    source = f"{ARCHIVE}, its folder, pickles of the splits or folders of the classes; default: download"
    flags = {"split_file": published_split(name), "source": {"type": Path, "help": source}}
    return Converter(convert_cifar100, "from CIFAR-100, downloaded unless given", flags, download_cifar100)


FC100, CIFAR_FS = _converter("FC100"), _converter("CIFAR-FS")
