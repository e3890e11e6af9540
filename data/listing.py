"""How the images of a split are found: in folders, one a class, or in a published json list."""

import os
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from data.decode import IMAGE_SUFFIXES
from engine.errors import UserError
from engine.files import matches_schema, misfit, read_json

Listing = tuple[list[str], list[Path], list[int]]  # class names; the path and the label of each image

# What people call the folders of the splits.
SPLIT_FOLDERS = {"base": ["base", "train"], "val": ["val", "validation", "valid"], "novel": ["novel", "test"]}
SHOWN = 6  # kinds of files in a line
SYSTEM_FILES = {"thumbs.db", "desktop.ini"}
# How to make images that are read of those that are not.
TO_JPEG = "convert them: magick mogrify -format jpg FILES, or on a Mac sips -s format jpeg FILES --out FOLDER"
CONVERT = {".heic": TO_JPEG, ".heif": TO_JPEG, ".avif": "pip install -U pillow reads them"}
FEW_CLASSES = (
    "{n} classes are too few for a benchmark: label images of them with "
    "'python predict.py --support {support} --query FOLDER --checkpoint FILE'"
)
# A published json list: names are those of classes, and of images with their folders.
LIST = {"label_names": list[str], "image_names": list[str], "image_labels": list[object]}


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of `root` that are named as a split, ours before other people's, which hold folders of classes."""
    present = {path.name.lower(): path for path in subfolders(root)}
    named = {split: [present[name] for name in names if name in present] for split, names in SPLIT_FOLDERS.items()}
    return {
        split: path for split, paths in named.items() for path in paths[:1] if path.name == split or subfolders(path)
    }


def subfolders(root: Path) -> list[Path]:
    """The folders in `root`, sorted by name, hidden ones left out; none where it is no folder."""
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")) if root.is_dir() else []


def shared_by(folders: dict[str, Path]) -> list[str]:
    """The classes that more than one of the folders of the splits has, sorted by name."""
    count = Counter(path.name for folder in folders.values() for path in subfolders(folder))
    return sorted(name for name, n in count.items() if n > 1)


def described(root: Path) -> str:
    """What a folder holds, in a few words: `2 folders (cat, dog) and 3 .zip`."""
    folders = [path.name for path in subfolders(root)]
    some = f"{len(folders)} folders ({', '.join(folders[:3])}{', ...' if len(folders) > 3 else ''})" if folders else ""
    files = [p for p in root.iterdir() if p.is_file() and is_shown(p.name)] if root.is_dir() else []
    return " and ".join(part for part in (some, kinds(files)) if part) or "nothing"


def some_of(names: list[str]) -> str:
    """The first five names, and the number of the others."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def is_shown(name: str) -> bool:
    """Whether a file or folder is neither hidden nor left by a file manager."""
    return not name.startswith(".") and name.lower() not in SYSTEM_FILES


def files_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images anywhere below a folder, in the order of torchvision's ImageFolder, and the files that are none."""

    def stop(error: OSError) -> None:
        raise error

    images: list[Path] = []
    others: list[Path] = []
    found = []
    for place, inner, names in os.walk(folder, onerror=stop, followlinks=True):
        above = Path(place).resolve() if inner else Path()  # a link to a folder around it would never end
        inner[:] = [n for n in inner if is_shown(n) and not above.is_relative_to(Path(place, n).resolve())]
        found += [(place, name) for name in names if is_shown(name)]
    for place, name in sorted(found):
        path = Path(place, name)
        (images if path.suffix.lower() in IMAGE_SUFFIXES else others).append(path)
    return images, others


def kinds(files: list[Path]) -> str:
    """`3 .heic (convert them: ...), 1 .txt`: how many files there are of each kind, and how those are read that can."""
    counts = Counter(path.suffix.lower() or "without suffix" for path in files).most_common()
    parts = [f"{n} {kind}{f' ({CONVERT[kind]})' if kind in CONVERT else ''}" for kind, n in counts[:SHOWN]]
    rest = [f"{sum(n for _, n in counts[SHOWN:])} others"] if len(counts) > SHOWN else []
    return ", ".join(parts + rest).encode("utf-8", "backslashreplace").decode()  # a name may be no text


def list_folder(root: Path, note: bool = True) -> Listing:
    """Class names, image paths and labels of `root/<class>/<image>`, sorted by name, hidden files left out.

    Folders between class and image are read as torchvision's ImageFolder reads them; a note says what is left out.
    """
    folders = subfolders(root)
    if not folders:
        raise UserError(f"{root} holds no class folders, {root}/<class>/<image>, but {described(root)}")
    paths: list[Path] = []
    labels: list[int] = []
    left_out = [path for path in root.iterdir() if path.is_file() and is_shown(path.name)]
    for label, folder in enumerate(folders):
        images, others = files_below(folder)
        if not images:
            besides = f" but {kinds(others)}" if others else ""
            raise UserError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}){besides}: remove it")
        paths += images
        labels += [label] * len(images)
        left_out += others
    if note and left_out:
        print(f"note: left out of {root.name}: {kinds(left_out)}")
    return [p.name for p in folders], paths, labels


def image_names(listing: Listing) -> list[str]:
    """`class/file` of each image; of a class that has two files of one name, `class/folder/file`."""
    class_names, paths, labels = listing
    names = [f"{class_names[label]}/{path.name}" for label, path in zip(labels, paths, strict=True)]
    twice = Counter(names)
    for label in {label for label, name in zip(labels, names, strict=True) if twice[name] > 1}:
        own = [i for i, other in enumerate(labels) if other == label]
        common = os.path.commonpath([paths[i].parent for i in own])
        for i in own:
            names[i] = f"{class_names[label]}/{paths[i].relative_to(common).as_posix()}"
    return names


def list_json(file: Path, image_root: Path | None) -> Listing:
    """Class names, image paths and labels of a published json file.

    Relative image names resolve against the folder of the file. `image_root` re-roots absolute ones, which are of
    somebody else's machine: see find_below.
    """
    try:
        record = read_json(file)
        if not isinstance(record, dict):
            raise ValueError("it is none")
        if wrong := misfit(record, LIST):
            raise ValueError(wrong)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no json object of {', '.join(LIST)} ({error}): write it again") from error
    label_names, names, raw_labels = (record[key] for key in LIST)
    names = [name.replace("\\", "/") for name in names]  # of a list that was written on Windows
    if not names or len(names) != len(raw_labels):
        raise UserError(f"{file} has {len(names)} image_names, {len(raw_labels)} image_labels: as many are needed")
    if not matches_schema(raw_labels, list[int]) or min(raw_labels) < 0:
        raise UserError(f"{file} has image_labels that are not whole numbers from 0: number the classes from 0")
    if len(set(label_names)) < len(label_names):
        twice = next(name for name in label_names if label_names.count(name) > 1)
        raise UserError(f"{file} names class {twice!r} twice in label_names: give every class a name of its own")
    used = sorted(set(raw_labels))
    if used[-1] < len(label_names):  # labels index label_names, some of which belong to other splits
        class_names = [label_names[label] for label in used]
    elif len(used) == len(label_names):  # labels are numbered over all splits, label_names hold this split's alone
        class_names = list(label_names)
    else:
        raise UserError(f"{file} has image_labels up to {used[-1]} but {len(label_names)} label_names")
    rank = {label: i for i, label in enumerate(used)}
    paths = [file.parent / name for name in names] if image_root is None else find_below(image_root, names, file)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{file} lists {len(missing)} images that are missing, such as {missing[0]}: give --image_root")
    return class_names, paths, [rank[label] for label in raw_labels]


def find_below(root: Path, names: list[str], file: Path) -> list[Path]:
    """Where images that somebody's `file` lists are below `root`: see longest_tail.

    Raises UserError when one is not there, or several are that the folders in the list do not tell apart.
    """
    places = by_file_name([path.as_posix() for path in files_below(root)[0]] if root.is_dir() else [])
    paths = []
    for name in names:
        found = longest_tail(places.get(PurePosixPath(name).name, []), name)
        if len(found) != 1:
            of_name = f"{len(found)} of this name ({found[0]}, {found[1]})" if found else "none of this name"
            raise UserError(f"{file} lists {name!r}, and below --image_root {root} is {of_name}: give its own folder")
        paths.append(Path(found[0]))
    return paths


def by_file_name(paths: Iterable[str]) -> dict[str, list[str]]:
    """Paths by their last parts."""
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(PurePosixPath(path).name, []).append(path)
    return found


def longest_tail(names: Collection[str], wanted: str) -> list[str]:
    """The names that end in as many of the last parts of a path as any of them does; none when not even in the last."""
    parts = [part for part in wanted.split("/") if part not in ("", ".")]
    for start in range(len(parts)):
        tail = "/" + "/".join(parts[start:])
        if found := [name for name in names if f"/{name}".endswith(tail)]:
            return found
    return []
