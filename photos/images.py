"""The user's own folders: a support folder of one subfolder per class, and query images anywhere below a folder.

The images are decoded into memory by the evaluation view of a benchmark: nothing is written beside them or elsewhere.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.decode import IMAGE_SUFFIXES, Reading, deep_maximum, open_rgb, to_rgb, white_of
from data.image_cache import eval_view
from data.listing import SYSTEM_FILES, kinds, list_folder
from engine.budget import check_memory
from engine.errors import UserError


def list_support(folder: Path, least: int = 2) -> tuple[list[str], list[Path], list[int]]:
    """Class names, image paths and labels of `folder/<class>/<image>`, any number of images per class.

    Raises UserError when the folder is missing, holds fewer classes than `least`, or a class holds no images.
    """
    if not folder.is_dir():
        raise UserError(f"support {folder} is not a folder: give a folder of one subfolder per class of examples")
    names, paths, labels = list_folder(folder, note=False)
    class_names = [printable(name) for name in names]
    if len(class_names) < least:
        raise UserError(f"support folder {folder} holds a single class, {class_names[0]!r}: give at least 2 subfolders")
    return class_names, paths, labels


def list_queries(query: Path) -> tuple[list[Path], list[str]]:
    """Paths of the query images, and their names below `query`, by path: all below a folder, or a single image.

    Hidden files and folders are left out, and links to folders are not followed. Raises UserError when there are none.
    """
    if query.is_file():
        return [query], [printable(query.name)]
    if not query.is_dir():
        raise UserError(f"query {query} does not exist: give a folder of images or one image")
    paths = [path for path in visible_files(query) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        what = f"holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}){other_files(query, paths)}"
        raise UserError(f"query folder {query} {what}: put the images to label there, or convert them")
    return paths, [printable(path.relative_to(query).as_posix()) for path in paths]


def visible_files(folder: Path) -> list[Path]:
    """All files below a folder, by path, but hidden ones and those that file managers leave."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.lower() not in SYSTEM_FILES)
    return [path for path in files if not any(part[0] == "." for part in path.relative_to(folder).parts)]


def other_files(folder: Path, used: list[Path]) -> str:
    """` besides 3 .heic, 1 .txt`: the visible files below a folder that are not used; empty when there are none."""
    others = sorted(set(visible_files(folder)) - set(used))
    return f" besides {kinds(others)}" if others else ""


def ignored_notes(folder: Path, used: list[Path]) -> list[str]:
    """What was left out of a user's folder, if anything, as a note."""
    ignored = other_files(folder, used)
    return [f"of {folder}, {len(used)} images were read{ignored}"] if ignored else []


def printable(name: str) -> str:
    r"""A file name that any UTF-8 file and terminal can hold: its bytes that are no text become such as `\xe9`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def folder_truth(names: list[str], class_names: list[str]) -> list[int | None]:
    """For each query name the index of the class that its folder is named as, or None."""
    label = {name: i for i, name in enumerate(class_names)}
    return [label.get(name.split("/")[-2]) if "/" in name else None for name in names]


@dataclass(frozen=True)
class View:
    """What a network takes of an image: s x s pixels of it, after it is read and resized by a rule."""

    img_size: int
    rule: str
    reading: Reading

    def of_folder(self, images: Sequence[object], num_workers: int) -> "View":
        """The view by which all of a folder's images are read: its white is the least that none of them exceeds."""
        paths = [Path(image) for image in images if isinstance(image, str | Path)]
        with ThreadPoolExecutor(max(1, num_workers)) as pool:
            white = white_of(max(pool.map(deep_maximum, paths), default=0.0))
        return replace(self, reading=replace(self.reading, white=max(white or 0, self.reading.white or 0) or None))


def open_image(image: object, reading: Reading) -> Image.Image:
    """The RGB image of a path, of an image of PIL or of a uint8 array (h, w, 3), (h, w, 4) or (h, w).

    Raises UserError when a file cannot be decoded, or for another type.
    """
    if isinstance(image, str | Path):
        return open_rgb(Path(image), reading)
    if isinstance(image, Image.Image):
        return to_rgb(image, reading)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        return to_rgb(Image.fromarray(image), reading)
    what = f"{image.dtype} array" if isinstance(image, np.ndarray) else type(image).__name__
    raise UserError(f"a {what} is no image: give a path, an image of PIL or a uint8 array (h, w, 3)")


def decode_views(
    images: Sequence[object], view: View, num_workers: int, skip_bad: bool = False
) -> tuple[Tensor, list[int], list[str]]:
    """Views of images (see open_image), uint8 (N, 3, s, s), and the indices of those they are of.

    With skip_bad, images that cannot be decoded are left out, and the third result says why; else UserError is raised,
    which names the file.
    """

    def decode(image: object) -> np.ndarray | UserError:
        try:
            return eval_view(open_image(image, view.reading), view.img_size, view.rule)
        except UserError as error:
            if not skip_bad:
                raise
            return error

    s = view.img_size
    n_bytes = 3 * len(images) * s**2
    check_memory(f"decoding to {s} x {s} pixels", n_bytes, "take a smaller image size, or fewer images")
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        decoded = list(pool.map(decode, images))
    views = [view for view in decoded if not isinstance(view, UserError)]
    kept = [i for i, view in enumerate(decoded) if not isinstance(view, UserError)]
    reasons = [str(error) for error in decoded if isinstance(error, UserError)]
    return torch.from_numpy(np.array(views, np.uint8).reshape(-1, 3, s, s)), kept, reasons
