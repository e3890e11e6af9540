"""Lists beside the images, in the forms of other repositories, which tell the class of each image, most also its split.

{train,val,test}.csv   filename,label (LibFewShot, FEAT, DeepEMD) or class_name,image_name (easyfsl)
{train,val,test}.json  class_names and class_roots (easyfsl)
labels.csv, info.json  Meta-Album, beside images/, without splits
Omniglot has no lists: <alphabet>/character<number>/<image>.png, of which a class is a character of an alphabet.
"""

import contextlib
import csv
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from data.converters.archives import FileTree
from data.converters.converter import TAGS, ImageItem, Read
from data.decode import IMAGE_SUFFIXES
from data.listing import by_file_name, longest_tail
from engine.errors import UserError
from engine.files import matches_schema

FILE_COLUMNS = ("filename", "file_name", "image_name", "image", "file", "path")
LABEL_COLUMNS = ("label", "class_name", "class", "category")
ALBUM_COLUMNS = ("image_column_name", "category_column_name")
CLASS_ROOTS = {"class_names": list[str], "class_roots": list[str]}
OMNIGLOT = re.compile(r"(?:.*/)?([^/]+)/(character\d+)/[^/]+\.png")
UNSPLIT = ""  # the split of classes that are still to be dealt out

T = TypeVar("T")
Row = tuple[str, str, Read]  # class, path and content of an image
Images = dict[str, dict[str, Read]]  # {class: {file name: content}}
Listed = dict[str, Images]  # by split


def read_lists(tree: FileTree, images: FileTree) -> Listed:
    """The images that the lists in `tree` name, which are in `images`; without a split under the key UNSPLIT.

    Empty where there are no such lists. Raises UserError when they are damaged, or their splits share a class.
    """
    rows = read_csv_lists(tree, images) or _read_class_roots(tree, images)
    rows = rows or _read_meta_album(tree) or _read_omniglot(tree)
    place = {name: i for i, name in enumerate(images.names)}  # a compressed archive is read front to back
    rows = {split: sorted(own, key=lambda row: place.get(row[1], 0)) for split, own in rows.items()}
    listed = {split: name_apart(own, tree.path) for split, own in rows.items()}
    count = Counter(name for classes in listed.values() for name in classes)
    if shared := [name for name, n in count.items() if n > 1]:
        raise UserError(f"the lists in '{tree.path}' share {shared[0]!r}: give class folders, which --split deals")
    return listed


def items_of(listed: Listed) -> list[ImageItem]:
    """The images of {split: {class: {file name: content}}}."""
    of_class = [(split, name, files) for split, classes in listed.items() for name, files in classes.items()]
    return [ImageItem(split, name, file, read) for split, name, files in of_class for file, read in files.items()]


def name_apart(rows: Iterable[tuple[str, str, T]], where: Path) -> dict[str, dict[str, T]]:
    """{class: {file name: content}} of rows (class, path, content).

    Images of one name in several folders have these in theirs, such as front_1.png. A class a/b is called a_b. Raises
    UserError when an image is listed twice.
    """
    classes: dict[str, dict[str, T]] = {}
    for class_name, path, content in rows:
        files = classes.setdefault(re.sub(r"[\\/]+", "_", class_name), {})
        if path in files:
            raise UserError(f"'{where}' lists image {path!r} of class {class_name!r} twice: list each image once")
        files[path] = content
    named: dict[str, dict[str, T]] = {class_name: {} for class_name in classes}
    for class_name, files in classes.items():
        count = Counter(PurePosixPath(path).name for path in files)
        common = os.path.commonpath([PurePosixPath(path).parent for path in files])
        for file, content in zip(map(PurePosixPath, files), files.values(), strict=True):
            longer = "_".join(file.relative_to(common).parts)
            named[class_name][file.name if count[file.name] == 1 else longer] = content
    return named


def split_pickles(names: Collection[str], where: Path) -> dict[str, str]:
    """The pickle of each split, whose name ends in the split's, such as CIFAR_FS_train.pickle; empty without any.

    train_val is of two splits; train_phase_val and train_phase_test hold other base images. Raises UserError when
    there is not one of each.
    """
    ending = {tag: rf"(?<![a-z])(?<!train_)(?<!train_phase_(?=val|test)){tag}\.(pkl|pickle)$" for tag in TAGS.values()}
    found = {split: [name for name in names if re.search(ending[tag], name)] for split, tag in TAGS.items()}
    if any(found.values()) and any(len(own) != 1 for own in found.values()):
        has = "; ".join(f"for {TAGS[split]} {', '.join(own) or 'none'}" for split, own in found.items())
        raise UserError(f"'{where}' must have one pickle for train, one for val and one for test; it has {has}")
    return {split: own[0] for split, own in found.items() if own}


def read_csv_lists(tree: FileTree, images: FileTree) -> dict[str, list[Row]]:
    """The rows of train.csv, val.csv and test.csv by split; empty where these are not in the tree.

    An image is looked for as images/<filename>, then wherever a path ends in <filename>, then by its last part; never
    in a folder that is named as another class. Raises UserError when a list is damaged, or an image ambiguous.
    """
    files_of_name = by_file_name(images.names)
    paths = _three_files(tree, ".csv")
    tables = {split: _read_table(tree, path, FILE_COLUMNS, LABEL_COLUMNS) for split, path in paths.items()}
    classes = {class_name for table in tables.values() for _, class_name in table}
    rows: dict[str, list[Row]] = {}
    for split, table in tables.items():
        rows[split] = []
        for file_name, class_name in table:
            last = PurePosixPath(file_name).name
            found = longest_tail(files_of_name.get(last, []), f"images/{file_name}")
            found = [name for name in found if PurePosixPath(name).parent.name not in classes - {class_name}]
            found = [name for name in found if PurePosixPath(name).parent.name == class_name] or found
            if len(found) > 1:
                raise UserError(f"{file_name!r} may be {found[0]} or {found[1]}: give one's folder as --image_root")
            path = found[0] if found else f"images/{last}"  # which is missing, and named at the end
            rows[split].append((class_name, path, partial(images.read, path)))
    return rows


def _three_files(tree: FileTree, suffix: str) -> dict[str, str]:
    """The path of each split's file, train, val and test, which lie side by side; empty where there are none.

    Raises UserError when one of three csv files is missing, or several folders have them.
    """
    names = [f"{tag}{suffix}" for tag in TAGS.values()]
    roots = [name.removesuffix(names[0]) for name in tree.names if PurePosixPath(name).name == names[0]]
    there = {root: [f"{root}{name}" for name in names if f"{root}{name}" in tree.names] for root in roots}
    whole = [paths for paths in there.values() if len(paths) == len(names)]
    if len(whole) > 1:
        raise UserError(f"'{tree.path}' has {' and '.join(paths[0] for paths in whole)}: give the folder of one")
    if roots and not whole and suffix == ".csv" and any(name.startswith("images/") for name in tree.names):
        raise UserError(f"'{tree.path}' has {' and '.join(there[roots[0]])}, but a benchmark {', '.join(names)}")
    return dict(zip(TAGS, whole[0], strict=True)) if whole else {}


def _read_table(tree: FileTree, name: str, file_columns: Collection[str], label_columns: Collection[str]) -> Any:
    """[(file, class)] of a csv file, by the first of its columns that has one of the names.

    Raises UserError when it is no such table.
    """
    header = ""
    try:
        lines = tree.read(name).decode("utf-8-sig").splitlines()
        header = lines[0] if lines else "nothing"
        rows = csv.reader(lines, delimiter=max(",;\t", key=header.count), skipinitialspace=True)
        titles = [title.strip() for title in next(rows)]
        file = next(i for i, title in enumerate(titles) if title in file_columns)
        label = next(i for i, title in enumerate(titles) if title in label_columns)
        return [(row[file].strip().replace("\\", "/"), row[label].strip()) for row in rows if row]
    except (ValueError, StopIteration, IndexError, csv.Error) as error:
        what = str(error) or f"its first line is {header[:80]!r}"
        raise UserError(f"'{tree.path / name}' is no csv file with columns as filename and label ({what})") from None


def _parsed(tree: FileTree, name: str) -> Any:
    """What a JSON file holds; None when it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(tree.read(name).decode("utf-8-sig"))


def _read_class_roots(tree: FileTree, images: FileTree) -> dict[str, list[Row]]:
    """easyfsl's train.json, val.json, test.json: the names of classes and their folders, without those inside.

    Its folders are relative to where it is run, so they are looked for by their longest tails that are in `images`.
    """
    specs = {split: _parsed(tree, name) for split, name in _three_files(tree, ".json").items()}
    if not specs or not all(matches_schema(spec, CLASS_ROOTS) for spec in specs.values()):
        return {}
    files: dict[str, list[str]] = {}
    for path in map(PurePosixPath, images.names):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            files.setdefault(path.parent.as_posix(), []).append(path.as_posix())
    rows: dict[str, list[Row]] = {split: [] for split in specs}
    for split, spec in specs.items():
        if len(spec["class_names"]) != len(spec["class_roots"]):
            raise UserError(f"'{tree.path}': the {split} json has other numbers of class_names and class_roots")
        for class_name, folder in zip(spec["class_names"], spec["class_roots"], strict=True):
            found = longest_tail(files, folder.replace("\\", "/"))
            if len(found) != 1:
                raise UserError(f"class folder {folder!r} is there {len(found)} times: give one as --image_root")
            rows[split] += [(class_name, path, partial(images.read, path)) for path in sorted(files[found[0]])]
    return rows


def _read_meta_album(tree: FileTree) -> dict[str, list[Row]]:
    """A set of Meta-Album: labels.csv and images/, and info.json, which names the columns."""
    roots = [name.removesuffix("info.json") for name in tree.names if PurePosixPath(name).name == "info.json"]
    roots = [root for root in roots if f"{root}labels.csv" in tree.names]
    if len(roots) > 1:
        raise UserError(f"'{tree.path}' has {len(roots)} sets of Meta-Album, in {', '.join(roots)}: give one of them")
    for root in roots:
        info = _parsed(tree, f"{root}info.json")
        if not matches_schema(info, dict.fromkeys(ALBUM_COLUMNS, str)):
            raise UserError(f"'{tree.path}/{root}info.json' does not name {' and '.join(ALBUM_COLUMNS)}")
        table = _read_table(tree, f"{root}labels.csv", *((info[key],) for key in ALBUM_COLUMNS))
        paths = [(class_name, f"{root}images/{file_name}") for file_name, class_name in table]
        return {UNSPLIT: [(class_name, path, partial(tree.read, path)) for class_name, path in paths]}
    return {}


def _read_omniglot(tree: FileTree) -> dict[str, list[Row]]:
    """Omniglot, where every image has its place: the characters are called <alphabet>_character<number>."""
    names = [name for name in tree.names if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    found = [(OMNIGLOT.fullmatch(name), partial(tree.read, name), name) for name in names]
    rows: list[Row] = [(f"{match[1]}_{match[2]}", name, read) for match, read, name in found if match]
    return {UNSPLIT: rows} if rows and len(rows) == len(found) else {}
