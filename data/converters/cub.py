"""CUB: CUB_200_2011, as its folder, its tgz or a zip (Wah et al., The Caltech-UCSD Birds-200-2011 Dataset, 2011).

Classes are split as few-shot papers do since Chen et al. (A Closer Look at Few-shot Classification, 2019): class
folders sorted by name and counted from 0; even ones are base, every fourth from 1 val, every fourth from 3 novel.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from data.converters.archives import FileTree, open_tree
from data.converters.converter import SOURCE, SPLITS, Conversion, Converter, ImageItem, Read
from data.decode import decode
from engine.errors import UserError

N_IMAGES = 11788
N_CLASSES = {"base": 100, "val": 50, "novel": 50}
SPLIT_OF_REMAINDER = ("base", "val", "base", "novel")  # of a class's position divided by 4


def convert_cub(source: Path, crop_bbox: bool) -> Conversion:
    """CUB_200_2011, whole images or (crop_bbox) what is inside their bounding boxes.

    Raises UserError when `source` does not have the layout.
    """
    with ExitStack() as stack:
        tree = stack.enter_context(open_tree(source))
        root, paths = _table(tree, "images.txt")
        if any(len(columns) != 1 or columns[0].count("/") != 1 for columns in paths.values()):
            raise UserError(f"'{source}': {root}images.txt does not list each image as 'number class/file'")
        boxes = _table(tree, "bounding_boxes.txt")[1] if crop_bbox else {}
        opened = stack.pop_all()
    image_of_path = {f"{root}images/{path}": (number, *path.split("/")) for number, (path,) in paths.items()}
    n_images = Counter(class_name for _, class_name, _ in image_of_path.values())
    split_of_class = {name: SPLIT_OF_REMAINDER[i % 4] for i, name in enumerate(sorted(n_images))}

    def items() -> Iterator[ImageItem]:
        # In the archive's order: a compressed one is read front to back, once.
        present = [name for name in tree.names if name in image_of_path]
        for path in present + sorted(set(image_of_path) - set(present)):
            number, class_name, file_name = image_of_path[path]
            read: Read = partial(tree.read, path)
            if crop_bbox:
                read = partial(_cropped, tree, path, _corners(boxes, number, source))
                file_name = f"{PurePosixPath(file_name).stem}.png"
            yield ImageItem(split_of_class[class_name], class_name, file_name, read)

    counts = {part: {name: n_images[name] for name, its in split_of_class.items() if its == part} for part in SPLITS}
    return Conversion(items(), N_IMAGES, N_CLASSES, counts, {"crop_bbox": crop_bbox}, opened=opened)


def _table(tree: FileTree, name: str) -> tuple[str, dict[str, list[str]]]:
    """One of the text files: the folder that it is in, and the columns of each line by the number that begins it."""
    roots = [found.removesuffix(name) for found in tree.names if PurePosixPath(found).name == name]
    if len(roots) != 1:
        raise UserError(f"'{tree.path}' has {len(roots)} files {name}, not one: give CUB_200_2011 or its tgz")
    lines = tree.read(f"{roots[0]}{name}").decode(errors="replace").splitlines()
    rows = [line.split() for line in lines if line.strip()]
    return roots[0], {row[0]: row[1:] for row in rows}


def _corners(boxes: dict[str, list[str]], number: str, source: Path) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of an image's `x y width height`."""
    try:
        x, y, width, height = (float(value) for value in boxes[number])
        return round(x), round(y), round(x + width), round(y + height)
    except (KeyError, ValueError, OverflowError):
        raise UserError(f"'{source}': bounding_boxes.txt has no 'x y width height' for image {number}") from None


def _cropped(tree: FileTree, path: str, corners: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """The pixels (h, w, 3) of an image inside a box. Raises ValueError when there are none."""
    image = decode(tree.read(path))
    left, top, right, bottom = corners
    image = image.crop((max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)))
    if 0 in image.size:
        raise ValueError("its bounding box is empty")
    return np.asarray(image)


CONVERTER = Converter(
    convert_cub,
    "from the folder CUB_200_2011, its tgz or a zip",
    {"source": SOURCE, "crop_bbox": {"action": "store_true", "help": "crop each image to its bounding box"}},
)
