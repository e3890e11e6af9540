"""miniImagenet, from any of the forms in which it is shared (Vinyals et al., Matching Networks, NeurIPS 2016).

The 100 classes of 600 images and their split are those of Ravi & Larochelle (Optimization as a Model for Few-shot
Learning, ICLR 2017). From ILSVRC's own files, the split file tells which images: it gives the position, from 1, of each
image among the files of its class sorted by their number.
"""

import csv
import re
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from data.converters.archives import FileTree, open_tree
from data.converters.converter import (
    SOURCE,
    SPLITS,
    TAGS,
    Conversion,
    Converter,
    ImageItem,
    are_images,
    check_split,
    published_split,
    whole_numbers,
)
from data.converters.safe_pickle import load_pickle_file
from data.decode import regular_bytes
from data.listing import list_json
from engine.errors import UserError

PER_CLASS = 600
WNID = re.compile(r"n\d{8}")
ILSVRC_IMAGE = re.compile(r"_(\d+)\.jpe?g$", re.IGNORECASE)

SplitPositions = dict[str, dict[str, list[int]]]


def convert_mini_imagenet(source: Path, split_file: SplitPositions, image_root: Path | None) -> Conversion:
    """miniImagenet from `source`, whose form is recognised; split_file is {split: {class: [position in ILSVRC]}}.

    Raises UserError when the form is unknown or the files are not as they should be.
    """
    check_split(split_file, dict[str, list[int]], "lists of positions by class name")
    counts = {split: {name: len(wanted) for name, wanted in split_file[split].items()} for split in SPLITS}
    if all((source / f"{split}.json").is_file() for split in SPLITS):
        items = _from_json(source, image_root)
    elif all((source / f"{tag}.csv").is_file() for tag in TAGS.values()):
        items = _from_csv(source)
    elif source.is_dir() and any(path.suffix in (".pkl", ".pickle") for path in source.iterdir()):
        pickled = {split: _read_pickle(_pickle_of(source, TAGS[split]), split) for split in SPLITS}
        items = _from_pickles(pickled)
        found = {split: list(rows_of_class) for split, (_, rows_of_class) in pickled.items()}
        if not set().union(*found.values()) & set().union(*split_file.values()):  # labels without ILSVRC's names
            counts = {split: dict.fromkeys(names, PER_CLASS) for split, names in found.items()}
    elif source.is_file() or _ilsvrc_train(source):
        items = _from_ilsvrc(source, split_file)
    else:
        raise UserError(
            f"--source '{source}' is none of the forms of miniImagenet: ILSVRC's train folder (n01532829/...) or "
            "train tar; a folder with train.csv, val.csv, test.csv and images/; with the pickles of train, val and "
            "test; or with base.json, val.json and novel.json"
        )
    n_classes = {split: len(split_file[split]) for split in SPLITS}
    n_images = sum(sum(classes.values()) for classes in counts.values())
    return Conversion(items, n_images, n_classes, counts, {"split_file": split_file})


def _from_json(source: Path, image_root: Path | None) -> Iterator[ImageItem]:
    """The lists base.json, val.json, novel.json, of images anywhere below image_root."""
    for split in SPLITS:
        class_names, paths, labels = list_json(source / f"{split}.json", image_root)
        for path, label in zip(paths, labels, strict=True):
            yield ImageItem(split, class_names[label], path.name, partial(regular_bytes, path))


def _from_csv(source: Path) -> Iterator[ImageItem]:
    """Ravi & Larochelle's train.csv, val.csv, test.csv (filename,label), with all images in images/."""
    for split, tag in TAGS.items():
        path = source / f"{tag}.csv"
        try:
            reader = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
            if not {"filename", "label"} <= set(reader.fieldnames or ()):
                raise ValueError("its first line is another")
            names = [(PurePosixPath(row["filename"]).name, row["label"] or "") for row in reader]
        except (ValueError, TypeError, csv.Error) as error:
            raise UserError(f"'{path}' is no csv file with the columns filename and label ({error})") from None
        for file_name, class_name in names:
            yield ImageItem(split, class_name, file_name, partial(regular_bytes, source / "images" / file_name))


def _ilsvrc_train(source: Path) -> Path | None:
    """The folder below `source` that holds the class folders of ILSVRC's training set, or their tars."""
    for folder in (source, source / "train", source / "ILSVRC/Data/CLS-LOC/train", source / "Data/CLS-LOC/train"):
        if folder.is_dir() and any(WNID.fullmatch(path.stem) for path in folder.iterdir()):
            return folder
    return None


def _from_ilsvrc(source: Path, positions: SplitPositions) -> Iterator[ImageItem]:
    """The images at the split's positions, from class folders, class tars, or the tar of class tars."""
    with ExitStack() as stack:
        whole = stack.enter_context(open_tree(source)) if source.is_file() else None
        tar_names = {PurePosixPath(name).name: name for name in whole.names} if whole else {}
        if whole and not any(WNID.fullmatch(PurePosixPath(name).stem) for name in tar_names):
            raise UserError(f"--source '{source}' is not ILSVRC's train tar, which holds n01440764.tar and 999 others")
        folder = _ilsvrc_train(source)
        for split in SPLITS:
            for wnid, wanted in positions[split].items():
                tar = f"{wnid}.tar"
                if whole and tar in tar_names:
                    opened = open_tree(source / tar, whole.read(tar_names[tar]))
                elif folder and (folder / wnid).is_dir():
                    opened = open_tree(folder / wnid)
                elif folder and (folder / tar).is_file():
                    opened = open_tree(folder / tar)
                else:
                    continue  # the count at the end names the class
                with opened as tree:
                    yield from _of_positions(tree, split, wnid, wanted)


def _of_positions(tree: FileTree, split: str, wnid: str, wanted: list[int]) -> Iterator[ImageItem]:
    """Images of one class by their positions, from 1, among its files sorted by number."""
    numbers = {name: int(found[1]) for name in tree.names if (found := ILSVRC_IMAGE.search(name))}
    names = sorted(numbers, key=numbers.__getitem__)
    if min(wanted, default=1) < 1:
        raise UserError(f"the split has the position {min(wanted)} for class {wnid}: positions are counted from 1")
    if max(wanted, default=0) > len(names):
        raise UserError(
            f"'{tree.path}' has {len(names)} images, but the split takes its image {max(wanted)}: "
            "the positions only hold in the whole ILSVRC-2012 training set"
        )
    for position in wanted:
        name = names[position - 1]
        yield ImageItem(split, wnid, PurePosixPath(name).name, partial(tree.read, name))


Pickled = tuple[NDArray[np.uint8], dict[str, list[int]]]  # images (n, h, w, 3), rows of each class


def _from_pickles(pickled: dict[str, Pickled]) -> Iterator[ImageItem]:
    """The images of the rows of each class."""
    for split, (images, rows_of_class) in pickled.items():
        for class_name, rows in rows_of_class.items():
            for row in rows:
                yield ImageItem(split, class_name, f"{row:05d}.png", partial(images.__getitem__, row))


def _pickle_of(source: Path, tag: str) -> Path:
    """The one pickle of a split: its name ends in the split's; train_phase_val and _test hold other base images."""
    ending = re.compile(rf"(?<![a-z])(?<!train_phase_(?=val|test)){tag}\.(pkl|pickle)$")
    found = sorted(path for path in source.iterdir() if ending.search(path.name))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"--source '{source}' must have one pickle whose name ends in '{tag}'; it has {names}")
    return found[0]


def _read_pickle(path: Path, split: str) -> Pickled:
    """Images (n, h, w, 3) uint8 and {class name: rows} of the two common shapes of a pickled split.

    mini-imagenet-cache-*.pkl is {image_data, class_dict: {name: [row]}}; the pickles of Gidaris & Komodakis and of
    later papers are {data | image_data, labels: [label], catname2label: {name: label}}.
    Raises UserError when keys, types or sizes are others.
    """
    content = load_pickle_file(path)
    keys = set(content) if isinstance(content, dict) else set()
    images = content.get("image_data", content.get("data")) if keys else None
    if images is None or not keys & {"class_dict", "labels"}:
        raise UserError(
            f"'{path}' has the keys {', '.join(sorted(map(str, keys))) or 'none'}: expected image_data and class_dict, "
            "or data and labels"
        )
    if not are_images(images):
        raise UserError(f"'{path}': its images are not an array (n, height, width, 3) of uint8")
    rows_of_class, names = content.get("class_dict", {}), content.get("catname2label", {})
    if not isinstance(rows_of_class, dict) or not isinstance(names, dict):
        raise UserError(f"'{path}': its class_dict or catname2label is no dictionary")
    if "class_dict" in content:
        where = f"'{path}': the rows of a class"
        return images, {str(name): whole_numbers(rows, where, len(images)) for name, rows in rows_of_class.items()}
    labels = np.array(whole_numbers(content["labels"], f"'{path}': its labels"))
    if len(labels) != len(images):
        raise UserError(f"'{path}' has {len(images)} images and {len(labels)} labels")
    numbers = whole_numbers(list(names.values()), f"'{path}': the numbers in catname2label")
    name_of = {number: str(name) for number, name in zip(numbers, names, strict=True)}
    return images, {
        name_of.get(label, f"{split}_{label:03d}"): np.flatnonzero(labels == label).tolist()
        for label in np.unique(labels).tolist()
    }


CONVERTER = Converter(
    convert_mini_imagenet,
    "from ILSVRC, csv files, pickles or json lists",
    {
        "source": SOURCE,
        "split_file": published_split("miniImagenet"),
        "image_root": {"type": Path, "help": "folder of the images that base/val/novel.json name"},
    },
)
