"""tieredImageNet, as its authors share it (Ren et al., Meta-learning for Semi-supervised Few-shot Learning, ICLR 2018).

Either {train,val,test}_images_png.pkl, lists of encoded PNG images, or {train,val,test}_images.npz, arrays of pixels;
with {train,val,test}_labels.pkl. Images are read one at a time: a split of some 450,000 never is in memory.
"""

import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from data.converters.converter import (
    SOURCE,
    SPLITS,
    TAGS,
    Conversion,
    Converter,
    ImageItem,
    are_images,
    whole_numbers,
)
from data.converters.safe_pickle import StoredArray, load_pickle_file
from engine.errors import UserError
from engine.files import matches_schema

N_CLASSES = {"base": 351, "val": 97, "novel": 160}
N_IMAGES = {"base": 448695, "val": 124261, "novel": 206209}


def convert_tiered_imagenet(source: Path) -> Conversion:
    """tieredImageNet from the folder `source`; a class is called <split>_<label>, and its name where it is known.

    Raises UserError when files are missing, damaged, or do not belong together.
    """
    files = {split: _images_file(source, tag) for split, tag in TAGS.items()}
    class_names = {split: _class_of_image(source / f"{TAGS[split]}_labels.pkl", split) for split in SPLITS}

    def items() -> Iterator[ImageItem]:
        for split in SPLITS:
            read = _encoded_images if files[split].suffix == ".pkl" else _pixel_images
            names = class_names[split]
            for i, image in enumerate(read(files[split], len(names))):
                yield ImageItem(split, names[i], f"{i:06d}.png", image)

    return Conversion(items(), sum(map(len, class_names.values())), N_CLASSES, N_IMAGES)


def _images_file(source: Path, tag: str) -> Path:
    for name in (f"{tag}_images_png.pkl", f"{tag}_images.npz"):
        if (source / name).is_file():
            return source / name
    raise UserError(f"--source '{source}' has neither {tag}_images_png.pkl nor {tag}_images.npz")


def _class_of_image(path: Path, split: str) -> list[str]:
    """The class name of each image of a split."""
    if not path.is_file():
        raise UserError(f"'{path}' is missing: it tells the classes of the images beside it")
    content = load_pickle_file(path)
    keys = list(content) if isinstance(content, dict) else []
    key = next((key for key in ("label_specific", "labels") if key in keys), None)
    if key is None:
        raise UserError(f"'{path}' has the keys {', '.join(map(str, keys[:9])) or 'none'}: expected label_specific")
    labels = whole_numbers(content[key], f"'{path}': its labels")
    titles = content.get("label_specific_str", [])
    # One title a class, in the order of the labels; anything else is no name of a class.
    named = matches_schema(titles, list[str]) and len(titles) == len(set(labels))
    slugs = {i: re.sub(r"[^A-Za-z0-9]+", "_", title).strip("_") for i, title in enumerate(titles)} if named else {}
    names = {label: "_".join(filter(None, (f"{split}_{label:03d}", slugs.get(label)))) for label in set(labels)}
    return [names[label] for label in labels]


def _encoded_images(path: Path, n_images: int) -> Iterator[Any]:
    """For each image of the list of PNG files, a function that reads its bytes."""
    images = load_pickle_file(path)
    if not matches_schema(images, list[StoredArray]) or len(images) != n_images:
        raise UserError(f"'{path}' is not a list of {n_images} arrays, one for each image that has a label")
    for image in images:
        yield image.array.tobytes


def _pixel_images(path: Path, n_images: int) -> Iterator[Any]:
    """For each image of the npz's array `images`, a function that returns its pixels (h, w, 3).

    numpy would load the array whole; a member of a zip is read front to back just as well.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
            if archive.testzip():  # before any image is written
                raise EOFError("its content does not fit its checksum")
            shape = _array_shape(file, path)
            if shape[0] != n_images:
                raise UserError(f"'{path}' has {shape[0]} images, and {n_images} have labels")
            size = prod(shape[1:])
            for _ in range(n_images):
                row = file.read(size)
                if len(row) != size:
                    raise EOFError("the array ends early")
                # These arrays were decoded by OpenCV, so their channels are in the order blue, green, red.
                pixels = np.frombuffer(row, np.uint8).reshape(shape[1:])[..., ::-1]
                yield partial(np.ascontiguousarray, pixels)
    except KeyError:
        raise UserError(f"'{path}' has no array 'images'") from None
    # Encrypted ones and unknown compressions come as RuntimeError, damage to the header as nearly anything.
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError, SyntaxError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"'{path}' is truncated or not an npz file ({reason}): get the file again") from None


def _array_shape(file: IO[bytes], path: Path) -> tuple[int, ...]:
    """Read the header of an npy file: its shape (n, h, w, 3), of uint8."""
    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, column_order, dtype = read_header(file)
    if column_order or not are_images(shape, dtype):
        raise UserError(f"'{path}': 'images' is not an array (n, height, width, 3) of uint8, but {shape} of {dtype}")
    return shape


CONVERTER = Converter(convert_tiered_imagenet, "from its authors' pkl or npz files", {"source": SOURCE})
