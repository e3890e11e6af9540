"""The user's own folders: a support folder of one subfolder a class, and query images anywhere below a folder.

The images are decoded as those of a benchmark are, but into memory: nothing is written beside them or elsewhere.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.decode import IMAGE_SUFFIXES, open_rgb, to_rgb
from data.image_cache import eval_view, map_in_chunks
from data.listing import list_folder
from engine.budget import check_memory
from engine.errors import UserError
from engine.run import progress_bar

SYSTEM_FILES = {"thumbs.db", "desktop.ini"}


def list_support(folder: Path) -> tuple[list[str], list[Path], list[int]]:
    """Class names, image paths and labels of `folder/<class>/<image>`, any number of images a class.

    Raises UserError when the folder is missing, holds fewer than two classes, or a class holds no images.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"support folder {folder} {what}: give a folder of one subfolder a class, with its examples")
    class_names, paths, labels = list_folder(folder)
    if len(class_names) < 2:
        raise UserError(
            f"support folder {folder} holds a single class, {printable(class_names[0])!r}: "
            "add a subfolder for each of the others, for at least 2 classes"
        )
    return [printable(name) for name in class_names], paths, labels


def list_queries(query: Path) -> tuple[list[Path], list[str]]:
    """Paths of the query images, and their names below `query`, by name: all below a folder, or a single image.

    Hidden files and folders are left out, and links to folders are not followed. Raises UserError when there are none.
    """
    if query.is_file():
        return [query], [printable(query.name)]
    if not query.is_dir():
        raise UserError(f"query {query} does not exist: give a folder of images or one image")
    paths = sorted(path for path in visible_files(query) if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise UserError(
            f"query folder {query} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}){other_files(query, paths)}: "
            "put the images to label there, or convert them"
        )
    return paths, [printable(path.relative_to(query).as_posix()) for path in paths]


def visible_files(folder: Path) -> Iterator[Path]:
    """All files below a folder but hidden ones and those that file managers leave."""

    def stop(error: OSError) -> None:
        raise UserError(f"folder {error.filename} cannot be read ({error.strerror}): see to its permissions") from error

    for root, subfolders, files in os.walk(folder, onerror=stop):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and name.lower() not in SYSTEM_FILES:
                yield Path(root, name)


def other_files(folder: Path, used: list[Path]) -> str:
    """` besides 3 .heic, 1 .txt`: the visible files below a folder that are not used, or nothing if there are none."""
    counts = Counter(path.suffix.lower() or "without suffix" for path in set(visible_files(folder)) - set(used))
    return (" besides " if counts else "") + ", ".join(f"{n} {printable(what)}" for what, n in counts.most_common())


def printable(name: str) -> str:
    r"""A file name that any UTF-8 file and terminal can hold: bytes of it that are no text become such as `\xe9`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def folder_truth(names: list[str], class_names: list[str]) -> list[int | None]:
    """For each query name the class that its folder is named as, or None."""
    label = {name: i for i, name in enumerate(class_names)}
    return [label.get(name.split("/")[-2]) if "/" in name else None for name in names]


def open_image(image: object) -> Image.Image:
    """The RGB image of a path, of an image of PIL or of a uint8 array (h, w, 3) or (h, w).

    Raises UserError when it is none of them or cannot be decoded.
    """
    if isinstance(image, str | Path):
        return open_rgb(Path(image))
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size:
        if image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4)):
            return to_rgb(Image.fromarray(image))
    what = f"a {image.dtype} array {image.shape}" if isinstance(image, np.ndarray) else f"a {type(image).__name__}"
    raise UserError(f"{what} is no image: give a path, an image of PIL or a uint8 array (h, w, 3)")


def decode_views(
    paths: Sequence[object], n_needed: int, img_size: int, num_workers: int, quiet: bool = False
) -> tuple[Tensor, list[int], list[str]]:
    """Evaluation views of images, uint8 (N, 3, s, s), and which of the paths (or see open_image) they are of.

    Images from index n_needed on that cannot be decoded are left out, and the third result says why. Raises
    UserError, naming the file, for those before.
    """

    def decode(path: object) -> np.ndarray | UserError:
        try:
            return eval_view(open_image(path), img_size)
        except UserError as error:
            return error

    n_bytes = 3 * len(paths) * img_size**2 + 4 * int(1.15 * img_size) ** 2
    check_memory(f"decoding to {img_size} x {img_size} pixels", n_bytes, "take a smaller image size, or fewer images")
    views = np.empty((len(paths), 3, img_size, img_size), dtype=np.uint8)
    kept: list[int] = []
    reasons: list[str] = []
    bar = progress_bar(None, "decode", "img", quiet, total=len(paths))
    with bar, ThreadPoolExecutor(max(1, num_workers)) as pool:
        for i, view in enumerate(map_in_chunks(pool, decode, paths)):
            if not isinstance(view, UserError):
                views[len(kept)] = view
                kept.append(i)
            elif i < n_needed:
                raise view
            else:
                reasons.append(str(view))
            bar.update()
    return torch.from_numpy(views[: len(kept)]), kept, reasons
