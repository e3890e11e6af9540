"""What a converter is: a function from the files that people have to the images of a benchmark, with its flags."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import UserError
from engine.files import matches_schema, read_json

SPLITS = ("base", "val", "novel")
TAGS = {"base": "train", "val": "val", "novel": "test"}  # what other people's files call the splits
SPLIT_FILES = Path(__file__).parents[2] / "fs_benchmarks" / "splits"

Option = dict[str, Any]  # the options of add_argument
Read = Callable[[], bytes | NDArray[np.uint8]]  # gives an encoded file, or pixels (h, w, 3)


@dataclass(frozen=True)
class ImageItem:
    """One image to write: `read` gives an encoded file's bytes, or pixels (h, w, 3) uint8 for a file_name in .png.

    `read` raises FileNotFoundError when the source lacks the image, and ValueError when it cannot be decoded.
    """

    split: str
    class_name: str
    file_name: str
    read: Read

    @property
    def name(self) -> str:
        return f"{self.split}/{self.class_name}/{self.file_name}"


@dataclass(frozen=True)
class Conversion:
    """The images that a converter hands over, lazily, and the published numbers of images and of classes per split.

    class_counts: known numbers of images of each class per split. `settings` tells two conversions of one benchmark
    apart; `title` is the name of the benchmark if the user chooses it; `opened` closes what the items read from.
    """

    items: Iterable[ImageItem]
    n_images: int
    n_classes: dict[str, int]
    class_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    title: str | None = None
    opened: ExitStack = field(default_factory=ExitStack)


@dataclass(frozen=True)
class Converter:
    """A subcommand of `python -m data.prepare`: its function, which takes the values of its flags by their names.

    One of the flags is `source`; where the user may leave it out, `download` gets it into the folder that it is given.
    """

    convert: Callable[..., Conversion]
    help: str
    flags: dict[str, Option]
    download: Callable[[Path], Path] | None = None


def read_split_file(path: str | Path) -> dict[str, Any]:
    """A JSON of {base, val, novel: classes}, a list or a dictionary by class name, or of those under `coarse_labels`.

    Raises UserError when the file has another form, or a class twice.
    """
    try:
        content = read_json(Path(path))
        lists = content.get("coarse_labels", content) if isinstance(content, dict) else {}
        if not matches_schema(lists, dict.fromkeys(SPLITS, list[str] | dict[str, list[int]])):
            raise ValueError("they must be lists of names, or of positions by name")
    except (OSError, ValueError) as error:
        raise UserError(f"--split_file '{path}' is not a JSON of base, val and novel classes ({error})") from None
    names = Counter(name for split in SPLITS for name in lists[split])
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise UserError(f"--split_file '{path}' lists {', '.join(twice)} twice; splits must not share classes")
    return dict(content)


def whose_classes(names: Collection[str]) -> str:
    """`; these are classes of CIFAR-FS ...`: the benchmark that most of the names are classes of; else empty."""
    for benchmark, command in {"miniImagenet": "miniImagenet", "CIFAR-FS": "CIFAR-FS or FC100"}.items():
        lists = read_split_file(SPLIT_FILES / f"{benchmark}.json")
        if 2 * sum(name in lists[split] for name in names for split in SPLITS) > len(names):
            return f"; these are classes of {benchmark}: python -m data.prepare {command} makes it"
    return ""


def check_split(split_file: dict[str, Any], kind: Any, what: str) -> None:
    """Raise UserError when base, val and novel of a split file are not of a type: `what` says of which."""
    if not matches_schema(split_file, dict.fromkeys(SPLITS, kind)):
        raise UserError(f"--split_file does not give base, val and novel as {what}: give one that is of this benchmark")


# Flags that several converters have.
SOURCE: Option = {"type": Path, "required": True, "help": "the file or folder that you have"}
IMAGE_ROOT: Option = {"type": Path, "help": "folder that holds the images of csv or json lists, when it is another one"}
SPLIT_FILE: Option = {"type": read_split_file, "help": "JSON of the classes of base, val and novel"}


def published_split(benchmark: str) -> Option:
    """The flag split_file, whose default is the published split of `benchmark`."""
    return SPLIT_FILE | {"default": str(SPLIT_FILES / f"{benchmark}.json")}  # argparse reads a str by the flag's type
