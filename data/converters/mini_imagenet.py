"""miniImagenet, from any of the forms in which it is shared (Vinyals et al., Matching Networks, NeurIPS 2016).

The 100 classes of 600 images and their split are those of Ravi & Larochelle (Optimization as a Model for Few-shot
Learning, ICLR 2017). From ILSVRC's own files, the split file tells which images: it gives the position, from 1, of each
image among the files of its class sorted by their number.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from data.converters.archives import open_tree
from data.converters.converter import (
    IMAGE_ROOT,
    SOURCE,
    SPLIT_FILES,
    SPLITS,
    TAGS,
    Conversion,
    Converter,
    ImageItem,
    check_split,
    published_split,
    read_split_file,
    whose_classes,
)
from data.converters.lists import Listed, items_of, name_apart, read_csv_lists, split_pickles
from data.converters.safe_pickle import are_images, load_pickle_file, whole_numbers
from data.decode import regular_bytes
from data.listing import Listing, described, files_below, is_shown, kinds, list_json, subfolders
from engine.errors import UserError

PER_CLASS = 600
WNID = re.compile(r"n\d{8}")
NUMBERED_FILE = re.compile(r"n\d{8}(_\d+|\d{8})\.\w+")  # n01532829_1234.JPEG of ILSVRC, n0153282900000005.jpg of Ravi
OTHER_ILSVRC = ("ILSVRC2012_val_", "ILSVRC2012_test_")  # which may lie in class folders, too

SplitPositions = dict[str, dict[str, list[int]]]


def convert_mini_imagenet(source: Path, split_file: SplitPositions, image_root: Path | None) -> Conversion:
    """miniImagenet from `source`, whose form is recognised; split_file is {split: {class: [position in ILSVRC]}}.

    Raises UserError when the form is unknown or the files are not as they should be.
    """
    check_split(split_file, dict[str, list[int]], "lists of positions by class name")
    counts = {split: {name: len(wanted) for name, wanted in split_file[split].items()} for split in SPLITS}
    if all((source / f"{split}.json").is_file() for split in SPLITS):
        items = _from_json(source, image_root)
    elif any(all((folder / f"{tag}.csv").is_file() for tag in TAGS.values()) for folder in (source, source / "split")):
        items = _from_csv(source, image_root, split_file)
    elif pickles := split_pickles(os.listdir(source) if source.is_dir() else [], source):
        pickled = {split: _read_pickle(source / name, split) for split, name in pickles.items()}
        refuse_cifar(source, pickled)
        found: Listed = {
            split: {c: {f"{row:05d}.png": partial(images.__getitem__, row) for row in rows} for c, rows in own.items()}
            for split, (images, own) in pickled.items()
        }
        items = iter(items_of(found))
        if all(re.fullmatch(rf"{split}_\d+", name) for split, names in found.items() for name in names):  # no names
            counts = {split: dict.fromkeys(names, PER_CLASS) for split, names in found.items()}
    elif source.is_file() or class_places(source).keys() & set().union(*(split_file[split] for split in SPLITS)):
        items = _from_classes(source, split_file)
    else:
        folders = [path.name for place in [source, *subfolders(source)] for path in subfolders(place)]
        raise UserError(
            f"--source '{source}' holds {described(source)}, none of the forms of miniImagenet: class folders or tars "
            "of ILSVRC or of 600 images each; ILSVRC's train tar; train.csv, val.csv, test.csv and images/; pickles of "
            f"train, val and test; or base.json, val.json and novel.json{whose_classes(folders)}"
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


def _from_csv(source: Path, image_root: Path | None, split_file: SplitPositions) -> Iterator[ImageItem]:
    """The lists train.csv, val.csv, test.csv of images anywhere below image_root; see read_csv_lists.

    The published lists tell the split of a class. Raises UserError when none of the classes is theirs.
    """
    split_of_class = {name: split for split in SPLITS for name in split_file[split]}
    with open_tree(source) as tree, open_tree(image_root or source) as images:
        rows = read_csv_lists(tree, images)
        class_names = sorted({class_name for table in rows.values() for class_name, _, _ in table})
        if not set(class_names) & set(split_of_class):
            raise UserError(f"the csv lists in '{source}' name no class of miniImagenet: python -m data.prepare folder")
        for split, table in rows.items():
            for class_name, files in name_apart(table, source).items():
                to_split = split_of_class.get(class_name, split)
                yield from (ImageItem(to_split, class_name, name, read) for name, read in files.items())


def class_places(source: Path) -> dict[str, list[Path]]:
    """{class: the folders and tars anywhere below `source` that are named as this class of ILSVRC}."""
    places: dict[str, list[Path]] = {}
    for place, folders, files in os.walk(source, followlinks=True):
        for name in sorted([*folders, *(file for file in files if file.endswith(".tar"))]):
            if WNID.fullmatch(name.removesuffix(".tar")):
                places.setdefault(name.removesuffix(".tar"), []).append(Path(place, name))
        folders[:] = [name for name in folders if is_shown(name) and not WNID.fullmatch(name)]
    return places


def images_in_folders(places: dict[str, list[Path]], positions: dict[str, list[int]]) -> dict[str, dict[str, Path]]:
    """{class: {file name: path}} of the images of miniImagenet, all folders of a class together.

    positions: of each class in ILSVRC, by which its images are picked where any class has more than these; else all are
    taken. Raises UserError where they cannot be picked.
    """
    files: dict[str, dict[str, Path]] = {}
    left_out: list[Path] = []
    for wnid in positions.keys() & places.keys():
        found = [files_below(place) for place in places[wnid] if place.is_dir()]
        images = [path for paths, _ in found for path in paths if not path.name.startswith(OTHER_ILSVRC)]
        numbered = {path.name: path for path in images[::-1] if NUMBERED_FILE.fullmatch(path.name)}
        others = [path for path in images if path.name not in numbered]  # whose names may be of other images elsewhere
        named = name_apart([(wnid, path.as_posix(), path) for path in others], places[wnid][0])
        files[wnid] = numbered | named.get(wnid, {})
        left_out += [path for _, rest in found for path in rest]
    if left_out:
        print(f"note: left out of the class folders: {kinds(left_out)}")
    if all(len(paths) <= len(positions[wnid]) for wnid, paths in files.items()):
        return files
    picked = {c: at_positions(paths, c, positions[c], places[c][0]) for c, paths in files.items() if paths}
    return {c: {name: files[c][name] for name in names} for c, names in picked.items()}


def list_published(root: Path, split: str) -> Listing | None:
    """The images of a split of miniImagenet from class folders anywhere below `root`; None where there are none.

    Raises UserError when none of the split's classes is there, or which images are miniImagenet's cannot be told.
    """
    positions = read_split_file(SPLIT_FILES / "miniImagenet.json")[split]
    images = images_in_folders(class_places(root), positions)
    class_names = sorted(wnid for wnid, files in images.items() if files)
    if 0 < len(class_names) < len(positions):
        print(f"note: {len(class_names)} of the {len(positions)} {split} classes of miniImagenet are in {root}")
    paths = [sorted(images[wnid].values()) for wnid in class_names]
    labels = [label for label, files in enumerate(paths) for _ in files]
    return (class_names, [path for files in paths for path in files], labels) if class_names else None


def _from_classes(source: Path, split_file: SplitPositions) -> Iterator[ImageItem]:
    """The images of the classes of the split, from class folders, class tars, or the tar of class tars."""
    places = class_places(source)
    in_folders = images_in_folders(places, {c: each for split in SPLITS for c, each in split_file[split].items()})
    with ExitStack() as stack:
        whole = stack.enter_context(open_tree(source)) if source.is_file() else None
        inner = {PurePosixPath(name).stem: name for name in whole.names} if whole else {}
        if whole and not any(map(WNID.fullmatch, inner)):
            raise UserError(f"--source '{source}' is not ILSVRC's train tar, which holds n01440764.tar and 999 others")
        for split, wnid, wanted in ((s, *each) for s in SPLITS for each in split_file[s].items()):
            for name, path in in_folders.get(wnid, {}).items():
                yield ImageItem(split, wnid, name, partial(regular_bytes, path))
            tars = [place for place in places.get(wnid, []) if place.is_file() and not in_folders.get(wnid)]
            if whole and wnid in inner:
                opened = open_tree(source / f"{wnid}.tar", whole.read(inner[wnid]))
            elif tars:
                opened = open_tree(tars[0])
            else:
                continue  # the count at the end names a class that is missing
            with opened as tree:
                files = {PurePosixPath(name).name: name for name in tree.names}
                for name in at_positions(files, wnid, wanted, tree.path):
                    yield ImageItem(split, wnid, name, partial(tree.read, files[name]))


def at_positions(names: Iterable[str], wnid: str, wanted: list[int], where: Path) -> list[str]:
    """The file names of a class at the positions, from 1, in ILSVRC's training set: Ravi's numbers are positions, and
    ILSVRC's names are sorted by their numbers.

    Raises UserError when a position is not there, or the names have neither number.
    """
    if min(wanted, default=1) < 1:
        raise UserError(f"the split has the position {min(wanted)} for class {wnid}: positions are counted from 1")
    numbers = {name: int(number[1].strip("_")) for name in names if (number := NUMBERED_FILE.fullmatch(name))}
    if numbers and not any("_" in name for name in numbers):
        return sorted(name for name, number in numbers.items() if number in wanted)
    ranked = sorted(numbers, key=numbers.__getitem__)
    if max(wanted, default=0) > len(ranked):
        raise UserError(
            f"'{where}' has {len(ranked)} images, but the split takes its image {max(wanted)}: the positions only hold "
            f"in the whole ILSVRC-2012 training set ({wnid}_1234.JPEG), and miniImagenet has {len(wanted)} of the class"
        )
    return [ranked[position - 1] for position in wanted]


Pickled = tuple[NDArray[np.uint8], dict[str, list[int]]]  # images (n, h, w, 3), rows of each class


def refuse_cifar(source: Path, pickled: dict[str, Pickled]) -> None:
    """Raise UserError when images have the 32x32 pixels of CIFAR."""
    if any(images.shape[1:3] == (32, 32) for images, _ in pickled.values()):
        n_classes = [len(rows_of_class) for _, rows_of_class in pickled.values()]
        name = "FC100" if n_classes == [60, 20, 20] else "CIFAR-FS"
        raise UserError(
            f"--source '{source}' holds {', '.join(map(str, n_classes))} classes of 32x32 pixels: these are {name}, "
            f"not miniImagenet, whose images have 84x84: python -m data.prepare {name} makes it"
        )


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
        found = ", ".join(sorted(map(str, keys))) or "none"
        raise UserError(f"'{path}' has the keys {found}: expected image_data and class_dict, or data and labels")
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
    {"source": SOURCE, "split_file": published_split("miniImagenet"), "image_root": IMAGE_ROOT},
)
